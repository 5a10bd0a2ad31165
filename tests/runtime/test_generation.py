"""lqedu.generate: the tokens of transformers, draws that a seed repeats, and what is refused."""

import math

import pytest
import torch
from torch import Tensor

import lqedu
from lqedu.errors import UsageError
from lqedu.methods import RTN
from lqedu.runtime.decoder import decoder_of
from lqedu.runtime.generation import draw
from tests.models.on_kernels import SIZES
from tests.models.tiny import VOCABULARY, tiny_model, tiny_windows

pytest.importorskip("triton", reason="the engine runs lqedu_kernels, or their references, which need Triton")


class Letters:
    """A tokenizer of single letters."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - 32 for letter in text]}

    def decode(self, ids: Tensor, skip_special_tokens: bool) -> str:
        return "".join(chr(int(i) + 32) for i in ids if not (skip_special_tokens and i <= 2))


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return lqedu.quantize(tiny_model("llama", **SIZES), RTN(group_size=32))


def test_tokens_are_those_of_transformers(model: torch.nn.Module) -> None:
    ids = tiny_windows(3, 9, seed=2)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, 9:]
    assert torch.equal(torch.stack(lqedu.generate(model, ids, max_new_tokens=12, eos=())), want)
    decoder = decoder_of(model)
    ragged = [ids[0], ids[1][:4], ids[2][:1]]
    got = lqedu.generate(decoder, ragged, max_new_tokens=12, eos=())
    for row, new in zip(ragged, got, strict=True):
        alone = model.generate(row[None], attention_mask=torch.ones(1, len(row)), **options)[0, len(row) :]
        assert torch.equal(new, alone)
    assert torch.equal(lqedu.generate(decoder, ids[0], max_new_tokens=12), want[0])  # one row in, one row out


def test_a_text_ends_before_its_stop(model: torch.nn.Module) -> None:
    ids = tiny_windows(2, 9, seed=2)
    free = lqedu.generate(model, ids, max_new_tokens=12, eos=())
    stop = int(free[0][5])
    got = lqedu.generate(model, ids, max_new_tokens=12, eos=stop)
    for row, full in zip(got, free, strict=True):
        cut = (full == stop).nonzero()[:1]
        assert torch.equal(row, full[: int(cut)] if len(cut) else full)
    assert len(got[0]) <= 5
    model.generation_config.eos_token_id = [stop, 0]
    try:
        assert torch.equal(lqedu.generate(model, ids[0], max_new_tokens=12), got[0])
    finally:
        model.generation_config.eos_token_id = 2


def test_texts(model: torch.nn.Module) -> None:
    options = {"tokenizer": Letters(), "max_new_tokens": 5, "eos": ()}
    one = lqedu.generate(model, "seven", **options)
    assert isinstance(one, str) and lqedu.generate(model, ["seven", "two"], **options)[0] == one
    with pytest.raises(UsageError, match="texts need a tokenizer"):
        lqedu.generate(model, "seven")


def test_draws_repeat_with_their_seed(model: torch.nn.Module) -> None:
    ids = tiny_windows(4, 5, seed=2)
    draws = [
        torch.stack(lqedu.generate(model, ids, max_new_tokens=10, eos=(), temperature=5.0, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    greedy = torch.stack(lqedu.generate(model, ids, max_new_tokens=10, eos=()))
    assert torch.equal(
        torch.stack(lqedu.generate(model, ids, max_new_tokens=10, eos=(), temperature=5.0, top_p=1e-6)), greedy
    )


def test_draws_follow_the_probabilities() -> None:
    p = torch.tensor([0.5, 0.05, 0.3, 0.15])
    logits = (2.0 * p.log()).expand(20000, 4)  # temperature 2 undoes the square
    for top_p, kept in ((1.0, p), (0.79, torch.tensor([0.5, 0, 0.3, 0])), (0.81, torch.tensor([0.5, 0, 0.3, 0.15]))):
        counts = torch.bincount(draw(logits, 2.0, top_p, torch.Generator().manual_seed(0)), minlength=4) / 20000
        want = kept / kept.sum()
        assert torch.all((counts - want).abs() <= 4 * (want * (1 - want) / 20000).sqrt())


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts are a text, a list of texts"),
        (["a", torch.tensor([1])], {}, "prompts are a text, a list of texts"),
        (torch.zeros(3), {}, "int64 token ids"),
        (torch.zeros(0, dtype=torch.int64), {}, "prompt 0 is empty"),
        (
            [torch.tensor([1]), torch.tensor([VOCABULARY])],
            {},
            f"prompt 1 holds token ids outside the model's {VOCABULARY}",
        ),
        (torch.tensor([1] * 60), {"max_new_tokens": 6}, "make 66, and the model has 64 positions"),
        (torch.tensor([1]), {"max_new_tokens": 0}, "max_new_tokens is a whole number, at least 1"),
        (torch.tensor([1]), {"temperature": math.nan}, "temperature is a finite number"),
        (torch.tensor([1]), {"top_p": 0.0}, "top_p is a finite number, above 0 and at most 1"),
        (torch.tensor([1]), {"seed": -1}, "seed is a whole number"),
        (torch.tensor([1]), {"eos": "</s>"}, "eos is a whole number"),
    ],
)
def test_refusals(model: torch.nn.Module, prompts: object, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        lqedu.generate(model, prompts, **options)


def test_the_last_position_is_used(model: torch.nn.Module) -> None:
    assert len(lqedu.generate(model, torch.tensor([5] * 60), max_new_tokens=5, eos=())) == 5  # the fifth is not read
