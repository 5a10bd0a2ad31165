"""Scoring of multiple choice against a loop of single forwards, decisions by hand, and everything that is refused."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from lqedu.errors import CalibrationError, LqeduError, UsageError
from lqedu.evaluation import Item, PairedAccuracy, paired_scores, score
from lqedu.evaluation.zeroshot import _encode
from lqedu.methods import RTN, QuaRot
from lqedu.methods.pipeline import quantize
from tests.models_tiny import ARCHITECTURES, tiny_model

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Letters:
    """A tokenizer of letters: "a" is 1, " a" is 27; pairs "qu" are one token; optionally a first token for each text."""

    eos_token_id: int | None = 0

    def __init__(self, *, bos: int | None = None) -> None:
        self.bos_token_id = bos

    def __call__(self, texts: Sequence[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [self._ids(text) for text in texts]}

    def _ids(self, text: str) -> list[int]:
        ids, rest = [] if self.bos_token_id is None else [self.bos_token_id], text
        while rest:
            piece = next(
                p for p in ("qu", " qu", rest[:2] if rest[0] == " " else rest[0], rest[0]) if rest.startswith(p)
            )
            rest = rest.removeprefix(piece)
            space, letter = piece.startswith(" "), piece.strip()
            ids.append(
                {"qu": 60, "": 62}.get(letter, LETTERS.find(letter) + 1) + (26 if space and letter != "qu" else space)
            )
        return ids


def items(count: int = 9, *, choices: int = 3, longest: int = 9, seed: int = 0) -> list[Item]:
    g = torch.Generator().manual_seed(seed)

    def text(least: int, most: int) -> str:
        return "".join(
            LETTERS[i] for i in torch.randint(26, (int(torch.randint(least, most + 1, (), generator=g)),), generator=g)
        )

    made = []
    for _ in range(count):
        context = f"{text(1, longest)} {text(1, longest)}"
        made.append(
            Item(
                (context,) * choices,
                tuple(text(1, 6) for _ in range(choices)),
                int(torch.randint(choices, (), generator=g)),
            )
        )
    return made


def reference(model: nn.Module, tokenizer: Letters, item: Item) -> list[tuple[float, bool]]:
    """One text and one position at a time, in float64."""
    found = []
    for context, continuation in zip(item.contexts, item.continuations, strict=True):
        whole, before = tokenizer([f"{context} {continuation}", context])["input_ids"]
        total, greedy = 0.0, True
        for place in range(len(before), len(whole)):
            with torch.no_grad():
                logits = model(torch.tensor([whole[:place]])).logits[0, -1].double()
            total += logits.log_softmax(-1)[whole[place]].item()
            greedy &= int(logits.argmax()) == whole[place]
        found.append((total, greedy))
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_a_loop_of_single_forwards(architecture):
    model, made = tiny_model(architecture).double(), items()
    result = score(model, Letters(), made)
    expected = [reference(model, Letters(), item) for item in made]
    for got, want in zip(result.log_likelihoods, expected, strict=True):
        assert got == pytest.approx([value for value, _ in want], rel=1e-12)
    best = [max(range(3), key=[value for value, _ in want].__getitem__) for want in expected]
    assert result.correct == tuple(b == item.gold for b, item in zip(best, made, strict=True))
    assert result.acc == sum(result.correct) / 9 and result.count == 9 and result.truncated == 0
    assert result.acc_stderr == pytest.approx(math.sqrt(result.acc * (1 - result.acc) / 8))  # of a mean of 0s and 1s
    gold = [want[item.gold][0] for want, item in zip(expected, made, strict=True)]
    assert result.gold_nll == pytest.approx(-sum(gold) / 9)


@pytest.mark.parametrize("tokens_per_batch", [1, 30, 100, 10**6])
def test_batches_and_padding_change_nothing(tokens_per_batch):
    model, made = tiny_model("llama").double(), items(12)
    whole = score(model, Letters(), made)
    other = score(model, Letters(), made, tokens_per_batch=tokens_per_batch)
    assert other.correct == whole.correct and other.correct_norm == whole.correct_norm
    for a, b in zip(whole.log_likelihoods, other.log_likelihoods, strict=True):
        assert a == pytest.approx(b, rel=1e-12)


def test_a_batch_holds_no_more_tokens_than_asked_for_and_no_logits_but_those_of_continuations(monkeypatch):
    model, made, shapes, heads = tiny_model("llama"), items(12), [], []
    model.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    model.lm_head.register_forward_hook(lambda _, args, out: heads.append(out.shape[:2]))
    score(model, Letters(), made, tokens_per_batch=60)
    assert len(shapes) > 3 and all(rows * width <= 60 for rows, width in shapes)
    letters = sum(len(text) for item in made for text in item.continuations)  # the longest tokens are two letters
    assert all(rows == 1 for rows, _ in heads) and sum(n for _, n in heads) <= letters
    assert not model.lm_head._forward_pre_hooks


def test_choices_of_one_token_share_their_text():
    model, read = tiny_model("llama").double(), []
    item = Item(("what is it",) * 3, ("a", "b", "cd"), 0)
    model.register_forward_pre_hook(lambda _, args: read.append(len(args[0])))
    result = score(model, Letters(), [item])
    assert read == [2]  # for a and b one, for cd another
    assert result.log_likelihoods[0] == pytest.approx([value for value, _ in reference(model, Letters(), item)])


class Fixed(nn.Module):
    """A model that gives each token its own probability, wherever it stands."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(len(logits), 4), nn.Linear(4, len(logits), bias=False)
        self.logits, self.config = logits, type("Config", (), {})()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: torch.Tensor, **_: object) -> object:
        zeros = self.head(self.embedding(ids))
        return type("Output", (), {"logits": 0 * zeros + self.logits})()


def test_the_longer_answer_wins_by_its_length_only():
    """-1 and -2.4 in nats: the short one is likelier, a character of the long one is; with the space it would not be."""
    logits = torch.full((64,), -40.0)
    logits[27], logits[1] = -1.0, -0.7  # " a" and "a"
    logits[0] = math.log(1 - math.exp(-1.0) - math.exp(-0.7))  # the rest, so that logits are log-probabilities
    item = Item(("x", "x"), ("a", "aaa"), 0)
    result = score(Fixed(logits), Letters(), [item, Item(("x", "x"), ("a", "aaa"), 1)])
    assert result.log_likelihoods[0] == pytest.approx((-1.0, -2.4), rel=1e-5)
    assert result.correct == (True, False) and result.correct_norm == (False, True)  # -1 / 1 < -2.4 / 3
    assert (result.acc, result.acc_norm) == (0.5, 0.5)
    assert math.isnan(score(Fixed(logits), Letters(), [item]).acc_stderr)


def test_the_first_of_equals_is_the_answer():
    model = Fixed(torch.zeros(64))
    result = score(model, Letters(), [Item(("x", "x"), ("a", "b"), 0), Item(("x", "x"), ("a", "b"), 1)])
    assert result.correct == result.correct_norm == (True, False)


def test_a_single_continuation_is_right_where_it_is_greedy():
    model = tiny_model("llama")
    whole = Letters()(["what is"])["input_ids"]
    with torch.no_grad():
        best = int(model(torch.tensor(whole)).logits[0, -1].argmax())
    letters = [" " + letter for letter in LETTERS]
    word = next((letter for letter in letters if Letters()([letter])["input_ids"] == [[best]]), None)
    logits = torch.zeros(64)
    logits[27] = 1.0
    made = [Item(("what is",), ("a",), 0), Item(("what is",), ("ab",), 0)]
    assert score(Fixed(logits), Letters(), made).correct == (True, False)
    if word is not None:
        assert score(model, Letters(), [Item(("what is",), (word[1:],), 0)]).correct == (True,)


def test_context_and_continuation_are_encoded_as_a_whole_and_cut():
    whole = Letters()(["x  quit"])["input_ids"][0]
    assert _encode(Letters(), [("x", " quit")]) == [(whole, len(whole) - 1)]
    assert _encode(Letters(), [("x ", "quit")]) == [(whole, len(whole) - 1)]  # the context's space moves
    assert _encode(Letters(), [("x\n", "a")])[0][1] == 2 + 0 * len(whole)


def test_without_a_context_the_text_begins_with_the_tokenizers_token():
    [(ids, length)] = _encode(Letters(), [("", "ab")])
    assert (ids, length) == ([0, 27, 2], 2)  # the end token, as there is none for the beginning
    assert _encode(Letters(bos=63), [("", "ab")]) == [([63, 27, 2], 2)]
    assert _encode(Letters(bos=63), [("x", "ab")]) == [([63, 24, 27, 2], 2)]
    begun = Letters()
    begun.eos_token_id = 27  # the continuation's own first token is not written twice, and is not scored
    assert _encode(begun, [("", "ab")]) == [([27, 2], 1)]
    model, item = tiny_model("llama").double(), Item(("",), ("ab",), 0)
    with torch.no_grad():
        log_p = model(torch.tensor([[0, 27]])).logits[0].log_softmax(-1)
    assert score(model, Letters(), [item]).log_likelihoods[0][0] == pytest.approx((log_p[0, 27] + log_p[1, 2]).item())


def test_a_long_text_loses_its_beginning():
    model = tiny_model("llama").double()  # 128 positions
    text = "".join(LETTERS[i % 26] for i in range(200))
    result = score(model, Letters(), [Item((text, "b"), ("abc", "abc"), 0)])
    ids = Letters()([f"{text} abc"])["input_ids"][0][-129:]
    with torch.no_grad():
        log_p = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    expected = sum(log_p[place - 1, ids[place]].item() for place in range(len(ids) - 3, len(ids)))
    assert result.log_likelihoods[0][0] == pytest.approx(expected) and result.truncated == 1
    assert score(model, Letters(), [Item(("a" * 128,), ("b",), 0)]).truncated == 0  # the last token is not read


@pytest.mark.parametrize("method", [RTN(bits=4, group_size=32), QuaRot(rounding="nearest")])
def test_quantized_models_are_scored(method):
    """With QuaRot activations are 4-bit per token and the keys and values too: neither sees the padding."""
    quantized, made = quantize(tiny_model("llama"), method).double(), items(4)
    result = score(quantized, Letters(), made)
    expected = [[value for value, _ in reference(quantized, Letters(), item)] for item in made]
    for got, want in zip(result.log_likelihoods, expected, strict=True):
        assert got == pytest.approx(want, rel=1e-4)


def test_half_precision_is_scored():
    model, made = tiny_model("llama"), items(6)
    whole, half = score(model, Letters(), made), score(model.to(torch.bfloat16), Letters(), made)
    assert half.gold_nll == pytest.approx(whole.gold_nll, rel=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_scores_the_same():
    model, made = tiny_model("llama"), items(6)
    whole, other = score(model, Letters(), made), score(model.to("cuda"), Letters(), made)
    assert other.gold_nll == pytest.approx(whole.gold_nll, rel=1e-4)


def test_the_model_is_left_as_it_was():
    model = tiny_model("opt").train()
    score(model, Letters(), items(2))
    assert all(part.training for part in model.modules())


def test_the_difference_is_paired_by_item():
    model, made = tiny_model("llama"), items(9)
    a, b = score(model, Letters(), made), score(tiny_model("llama", seed=1), Letters(), made)
    difference = paired_scores(a, b)
    steps = torch.tensor([x - y for x, y in zip(a.correct, b.correct, strict=True)], dtype=torch.float64)
    assert difference.delta_acc == pytest.approx(a.acc - b.acc) and difference.delta_acc_norm == pytest.approx(
        a.acc_norm - b.acc_norm
    )
    assert difference.acc_stderr == pytest.approx(steps.std().item() / 3) and difference.count == 9
    assert paired_scores(a, a) == PairedAccuracy(0.0, 0.0, 0.0, 0.0, 9)
    other = [*made[:-1], Item(made[-1].contexts, made[-1].continuations, (made[-1].gold + 1) % 3)]
    with pytest.raises(UsageError, match="different items"):
        paired_scores(a, score(model, Letters(), other))


def refused(
    item: Item, match: str, *, tokenizer: object = None, error: type[LqeduError] = UsageError, **options: int
) -> None:
    with pytest.raises(error, match=match):
        score(tiny_model("llama"), tokenizer or Letters(), [item], **options)


def test_what_cannot_be_scored_is_refused():
    good = Item(("x", "x"), ("a", "b"), 0)
    with pytest.raises(UsageError, match="no items"):
        score(tiny_model("llama"), Letters(), [])
    refused(good, "tokens_per_batch is a whole number", tokens_per_batch=0)
    refused(good, "needs the model's tokenizer", tokenizer="none")
    refused(Item(("x",), ("a" * 129,), 0), "has 129 tokens, more than the model's 128 positions")
    nameless = Letters()
    nameless.eos_token_id = None
    refused(Item(("",), ("a",), 0), "no token that begins or ends a text", tokenizer=nameless)
    refused(good, "outside the model's 128", tokenizer=Letters(bos=500))

    class Merging(Letters):
        def __call__(self, texts):
            return {"input_ids": [[1] for _ in texts]}

    refused(good, "'a' has no token of its own", tokenizer=Merging(), error=CalibrationError)
    model = tiny_model("llama")
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(CalibrationError, match="no finite likelihood for 2 of 2"):
        score(model, Letters(), [good])


@pytest.mark.parametrize(
    ("contexts", "continuations", "gold", "match"),
    [
        ((), (), 0, "0 continuations and 0 contexts"),
        (("x",), ("a", "b"), 0, "2 continuations and 1 contexts"),
        (("x", "x"), ("a", ""), 0, "continuation 1 is empty"),
        (("x", "x"), ("a", "b"), 2, "right answer is 2, of 2 choices"),
        (("x", "x"), ("a", "b"), -1, "right answer is -1"),
    ],
)
def test_an_item_that_makes_no_sense_is_refused(contexts, continuations, gold, match):
    with pytest.raises(UsageError, match=match):
        Item(contexts, continuations, gold)
