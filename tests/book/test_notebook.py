"""The setup cell: one line, nothing global but the figure style, and everything cached that is large."""

import subprocess
import sys

import pytest
import torch

import lqedu
from lqedu.book import notebook, setup
from lqedu.errors import UsageError


@pytest.fixture(autouse=True)
def _clean():
    matplotlib = pytest.importorskip("matplotlib")
    for cached in (notebook._model, notebook._text, notebook._windows):
        cached.cache_clear()
    with matplotlib.rc_context():
        yield
    for cached in (notebook._model, notebook._text, notebook._windows):
        cached.cache_clear()


def test_setup_prints_one_line(capsys):
    setup()
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert out.startswith(f"lqedu {lqedu.__version__} · torch {torch.__version__.split('+')[0]} · cpu · ")
    assert f"{torch.get_num_threads()} thread" in out


def test_setup_seeds_nothing_global():
    before = torch.get_rng_state()
    ctx = setup()
    torch.rand(3, generator=ctx.generator)
    assert torch.get_rng_state().equal(before)


def test_generators_repeat():
    a, b = setup(), setup()
    assert torch.rand(3, generator=a.generator).equal(torch.rand(3, generator=b.generator))
    assert torch.rand(3, generator=a.seed(5)).equal(torch.rand(3, generator=b.seed(5)))
    assert not torch.rand(3, generator=a.seed(5)).equal(torch.rand(3, generator=a.seed(6)))


def test_a_context_cannot_be_changed():
    with pytest.raises(AttributeError):
        setup().model_id = "another"


def test_an_unknown_device_is_refused():
    with pytest.raises(UsageError, match="device 'quantum' cannot be used here"):
        setup(device="quantum")


@pytest.fixture
def loads(monkeypatch):
    """Stand-ins for the loaders, which count their calls."""
    calls = []

    class Tokenizer:
        def __call__(self, text):
            return {"input_ids": list(range(len(text)))}

    def load_model(name, *, device):
        calls.append((name, device))
        return torch.nn.Linear(1, 1), Tokenizer()

    def load_corpus(name, *, split):
        if split not in ("calibration", "evaluation"):
            raise UsageError("unknown split")
        calls.append((name, split))
        return "x" * 1000

    monkeypatch.setattr("lqedu.models.load_model", load_model)
    monkeypatch.setattr("lqedu.calibration.load_corpus", load_corpus)
    return calls


def test_model_and_text_are_loaded_once(loads):
    ctx = setup(model="org/name", corpus="my.txt")
    assert ctx.model() is setup(model="org/name").model()
    ctx.windows("evaluation", count=2, length=16)
    ctx.windows("evaluation", count=2, length=16)
    assert ctx.text("evaluation") == "x" * 1000
    assert sorted(loads) == [("my.txt", "evaluation"), ("org/name", "cpu")]


def test_windows_are_those_of_the_command_line(loads):
    ctx = setup()
    text, (_, tokenizer) = "x" * 1000, ctx.model()
    first = lqedu.token_windows(tokenizer, text, length=16, count=4)
    drawn = lqedu.token_windows(tokenizer, text, length=16, count=4, seed=0)
    assert ctx.windows("evaluation", count=4, length=16).equal(first)
    assert ctx.windows("calibration", count=4, length=16).equal(drawn)


def test_windows_are_copies(loads):
    ctx = setup()
    ctx.windows("evaluation", count=2, length=8).zero_()
    assert int(ctx.windows("evaluation", count=2, length=8).max()) > 0


def test_an_unknown_split_is_refused_before_a_model_is_loaded(loads):
    with pytest.raises(UsageError, match="unknown split"):
        setup().windows("training")
    assert loads == []


def test_importing_book_and_viz_is_light():
    heavy = ("torch", "matplotlib", "IPython", "transformers", "anywidget")
    code = f"import sys, lqedu.book, lqedu.viz; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_function_results_wins_over_its_module():
    import importlib

    assert callable(lqedu.book.results)
    assert importlib.import_module("lqedu.book.results").results is lqedu.book.results
    assert callable(lqedu.book.results)
