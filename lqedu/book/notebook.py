"""The first cell of every chapter: one line of output, one object that everything random or large comes from."""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from lqedu.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

_CALIBRATION_SEED = 0  # which windows "calibration" means: the same ones in every chapter


@dataclass(frozen=True)
class Context:
    """What a chapter works with.

    Attributes:
        model_id: the model that :meth:`model` loads; the one thing a reader changes, through ``setup(model=...)``.
        corpus: the text that :meth:`text` and :meth:`windows` read.
        device: where the model goes.
        threads: CPU threads that torch uses.
        generator: seeded with 0 when the chapter starts; drawing from it moves it on. :meth:`seed` gives a fresh one.
    """

    model_id: str
    corpus: str
    device: str
    threads: int
    generator: "torch.Generator"

    def seed(self, number: int) -> "torch.Generator":
        """A new CPU generator seeded with ``number``."""
        import torch

        return torch.Generator().manual_seed(number)

    def model(self) -> tuple["nn.Module", "PreTrainedTokenizerBase"]:
        """``(model, tokenizer)``, loaded once a process. Shared: build new modules instead of changing this one."""
        return _model(self.model_id, self.device)

    def text(self, split: str) -> str:
        """The text of a split, "calibration" or "evaluation"."""
        return _text(self.corpus, split)

    def windows(self, split: str, count: int = 32, length: int = 512) -> "Tensor":
        """Token windows of a split, int64 ``[count, length]`` on the CPU; a copy at every call.

        Calibration windows are a random choice with a fixed seed, evaluation windows the first of the text; that is
        what the command line does too, so numbers agree between them.

        Raises:
            UsageError: no such split.
            CalibrationError: the text has fewer windows.
        """
        return _windows(self.model_id, self.device, self.corpus, split, count, length).clone()


def setup(model: str = "smollm2-135m", *, corpus: str = "sotu", device: str = "cpu") -> Context:
    """Prepare a notebook: set the figure style, print one line that says what runs here, return its :class:`Context`.

    Args:
        model: the embedded model, the id of one on the Hugging Face Hub, or a folder.
        corpus: "sotu", "wikitext2", "c4", or the path of a text file.
        device: "cpu", or a device of torch such as "cuda".

    Nothing is downloaded, no global generator is seeded and no warning is silenced.

    Raises:
        UsageError: torch knows no such device, or has none here.
    """
    import torch

    import lqedu
    from lqedu import viz

    viz.use_style()
    context = Context(model, corpus, _device(device), torch.get_num_threads(), torch.Generator().manual_seed(0))
    where = context.device
    if where.startswith("cuda"):
        where += f" ({torch.cuda.get_device_name(where)})"
    threads = f"{context.threads} thread{'s' if context.threads != 1 else ''}"
    print(f"lqedu {lqedu.__version__} · torch {torch.__version__.split('+')[0]} · {where} · {threads}")
    return context


def _device(name: str) -> str:
    import torch

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} cannot be used here ({reason}); use device='cpu'") from error
    return str(torch.device(name))


@lru_cache(maxsize=1)
def _model(model_id: str, device: str) -> tuple["nn.Module", "PreTrainedTokenizerBase"]:
    from lqedu.models import load_model

    return load_model(model_id, device=device)


@lru_cache(maxsize=4)
def _text(corpus: str, split: str) -> str:
    from lqedu.calibration import load_corpus

    return load_corpus(corpus, split=split)


@lru_cache(maxsize=8)
def _windows(model_id: str, device: str, corpus: str, split: str, count: int, length: int) -> "Tensor":
    from lqedu.calibration import token_windows

    text = _text(corpus, split)  # first, because it refuses an unknown split before a model is loaded
    seed = _CALIBRATION_SEED if split == "calibration" else None
    return token_windows(_model(model_id, device)[1], text, length=length, count=count, seed=seed)
