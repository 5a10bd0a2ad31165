"""The model card of a saved model: README.md that says what was done to which model, and what it cost.

Nothing in it is typed by hand. Method, options and bits per weight come from the model, calibration from the windows that
were used, quality from what :func:`lqedu.perplexity` returned. Facts that nobody gave are left out or called not known. Chapter
``21-serving`` reads one.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from lqedu import __version__
from lqedu._statistics import finite
from lqedu.errors import CheckpointError, UsageError
from lqedu.evaluation.perplexity import Perplexity, paired, windows_sha256
from lqedu.runtime.linear import quantized_linears

CARD = "README.md"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PACKAGES = {  # format of the weights -> library that a Hub page names, and what else has to be installed
    "lqedu": ("lqedu", "lqedu"),
    "compressed-tensors": ("transformers", "compressed-tensors"),
    "gptq": ("transformers", "gptqmodel"),
    "awq": ("transformers", "gptqmodel"),
    "qserve": ("lqedu", "lqedu"),
}


@dataclass(frozen=True)
class Calibration:
    """What the model saw while it was quantized.

    Attributes:
        text: name of the corpus, or of the file without its folder.
        windows, length: how many windows of how many tokens.
        seed: that drew the windows; ``None`` where they were not drawn.
        sha256: of the token ids, as in :class:`lqedu.evaluation.perplexity.Perplexity`.
    """

    text: str
    windows: int
    length: int
    seed: int | None
    sha256: str

    @classmethod
    def of(cls, text: str, windows: Tensor, seed: int | None = None) -> "Calibration":
        """From the windows ``[count, length]`` themselves."""
        return cls(shown_name(text), *windows.shape, seed, windows_sha256(windows))


@dataclass(frozen=True)
class Quality:
    """Perplexity of the quantized model on one text, and of the dense one on the same windows where it was measured.

    Attributes:
        text: name of the corpus, or of the file without its folder.
        windows, tokens: how many were read.
        ppl, nll, stderr: of the quantized model; no standard error with a single window, no ``ppl`` above the largest float.
        dense_ppl: of the model it was made from.
        delta_nll, delta_stderr: how much worse it is, paired by window.
        sha256: of the token ids.
    """

    text: str
    windows: int
    tokens: int
    ppl: float | None
    nll: float
    stderr: float | None
    dense_ppl: float | None
    delta_nll: float | None
    delta_stderr: float | None
    sha256: str

    @classmethod
    def of(cls, text: str, quantized: Perplexity, dense: Perplexity | None = None) -> "Quality":
        """From what was measured (UsageError where the two were not measured on the same windows)."""
        difference = None if dense is None else paired(quantized, dense)
        return cls(
            shown_name(text), len(quantized.window_nll), quantized.tokens,
            finite(quantized.ppl), quantized.nll, finite(quantized.stderr),
            None if dense is None else dense.ppl,
            None if difference is None else difference.delta_nll,
            None if difference is None else finite(difference.stderr),
            quantized.windows_sha256,
        )  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What a quantized model does not know about itself; kept in ``lqedu.json`` and carried through every export.

    Attributes:
        base_model: the dense model, as :func:`lqedu.load_model` was asked for it; of a folder only its name is kept.
        base_sha256: :func:`lqedu.models.load.weights_sha256` of it.
        calibration: ``None`` where no text was used, or none is known.
        quality: what was measured.
    """

    base_model: str | None = None
    base_sha256: str | None = None
    calibration: Calibration | None = None
    quality: tuple[Quality, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; :meth:`from_dict` is the inverse."""
        return asdict(self) | {"quality": [asdict(quality) for quality in self.quality]}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> "Facts":
        """Inverse of :meth:`to_dict`.

        Raises:
            CheckpointError: unknown, missing or misshapen fields.
        """
        try:
            if not isinstance(d, Mapping):
                raise TypeError(f"got {d!r}")
            unknown = set(d) - {field.name for field in fields(cls)}
            if unknown:
                raise TypeError(f"unknown fields {sorted(unknown)}")
            calibration = d.get("calibration")
            facts = cls(
                d.get("base_model"),
                d.get("base_sha256"),
                None if calibration is None else Calibration(**calibration),
                tuple(Quality(**quality) for quality in d.get("quality", ())),
            )
            for part in (facts, *filter(None, (facts.calibration,)), *facts.quality):
                _check_types(part)
            return facts
        except TypeError as error:
            raise CheckpointError(f"the facts of the model card are not understood: {error}") from error


def model_card(
    method: Mapping[str, Any],
    *,
    bits_per_weight: float,
    facts: Facts = Facts(),
    notes: Sequence[str] = (),
    attention: Mapping[str, Any] | None = None,
    format: str = "lqedu",
) -> str:
    """README.md of a quantized model, with the YAML head that the Hub reads.

    Args:
        method: name and options, as ``model.lqedu_method``.
        bits_per_weight: of the quantized linears, scales and zero points counted.
        facts: what else is known.
        notes: ``model.lqedu_notes``.
        attention: how keys and values are stored, ``AttentionPath.to_dict()``.
        format: of the weights: "lqedu", "compressed-tensors", "gptq", "awq" or "qserve".

    Raises:
        UsageError: another format.
    """
    if format not in _PACKAGES:
        raise UsageError(f"no model card for the format {format!r}; there are {', '.join(_PACKAGES)}")
    parts = [
        _head(method, facts, format),
        f"# {_cell(_base(facts))}, quantized by {method['name']}\n\n"
        f"{bits_per_weight:.3f} bits per weight in the quantized linear layers, scales and zero points counted. "
        f"Written by lqedu {__version__} in the format {format}.",
        "## Method\n\n" + _table(("option", "value"), [("method", method["name"]), *method["options"].items()]),
        _attention(attention),
        "".join(f"\n- {_cell(note)}" for note in notes).strip(),
        "## Data\n\n" + _data(facts),
        "## Measured quality\n\n" + _quality(facts.quality),
        "## Loading\n\n" + _loading(format),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def card_of(model: nn.Module, facts: Facts | None = None, format: str = "lqedu") -> str:
    """The card of a quantized model; ``facts`` are those the model carries (``lqedu_facts``) unless given."""
    layers = quantized_linears(model).values()
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return model_card(
        model.lqedu_method,
        bits_per_weight=8 * sum(layer.nbytes for layer in layers) / weights,
        facts=facts_of(model) if facts is None else facts,
        notes=getattr(model, "lqedu_notes", ()),
        attention=model.lqedu_attention.to_dict() if hasattr(model, "lqedu_attention") else None,
        format=format,
    )


def facts_of(model: nn.Module) -> Facts:
    """The facts a model carries; one that was never told any still knows what it was loaded from."""
    known = getattr(model, "lqedu_facts", None)
    return (
        known if known is not None else Facts(base_model=shown_name(getattr(model.config, "name_or_path", "")) or None)
    )


def _head(method: Mapping[str, Any], facts: Facts, format: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    bits = method["options"].get("bits")
    results = [
        EvalResult("text-generation", quality.text, quality.text, "perplexity", quality.ppl)
        for quality in facts.quality
        if quality.ppl is not None
    ]
    data = ModelCardData(
        base_model=facts.base_model if _HUB_ID.fullmatch(facts.base_model or "") else None,
        library_name=_PACKAGES[format][0],
        pipeline_tag="text-generation",
        tags=["lqedu", "quantized", method["name"], format, *([f"{bits}-bit"] if isinstance(bits, int) else [])],
        model_name=f"{_base(facts)} {method['name']}" if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _attention(attention: Mapping[str, Any] | None) -> str:
    if attention is None:
        return ""
    stored = {"keys": attention["key"], "values": attention["value"]}
    rows = [(name, "as they come" if grid is None else json.dumps(grid)) for name, grid in stored.items()]
    rows += [("keys in a Hadamard basis", attention["hadamard"]), ("keys less their mean", attention["centred"])]
    return "## Keys and values\n\n" + _table(("what", "how it is stored"), rows)


def _data(facts: Facts) -> str:
    rows: list[tuple[str, Any]] = [("dense model", _base(facts))]
    rows += [("its weights, sha256", facts.base_sha256)] if facts.base_sha256 else []
    if facts.calibration is None:
        rows.append(("calibration", "none, or not known"))
    else:
        seen = facts.calibration
        rows.append(("calibration", f"{seen.text}: {seen.windows} windows of {seen.length} tokens"))
        rows += [("seed of the windows", seen.seed)] if seen.seed is not None else []
        rows.append(("its token ids, sha256", seen.sha256))
    return _table(("fact", "value"), rows)


def _quality(measured: Sequence[Quality]) -> str:
    if not measured:
        return "Not measured. `lqedu eval` measures it."
    rows = []
    for quality in measured:
        ppl = "above any float" if quality.ppl is None else f"{quality.ppl:.3f}"
        dense = "" if quality.dense_ppl is None else f"{quality.dense_ppl:.3f}"
        error = "" if quality.delta_stderr is None else f" ± {quality.delta_stderr:.4f}"
        worse = "" if quality.delta_nll is None else f"{quality.delta_nll:+.4f}{error}"
        rows.append((quality.text, quality.windows, quality.tokens, ppl, dense, worse))
    names = ("text", "windows", "tokens", "perplexity", "of the dense model", "NLL against dense")
    return (
        _table(names, rows)
        + "\n\nWindows do not overlap, each is read from its first token; differences are paired by "
        "window, ± is one standard error."
    )


def _loading(format: str) -> str:
    _, package = _PACKAGES[format]
    if format in ("lqedu", "qserve"):
        code = 'import lqedu\n\nmodel, tokenizer = lqedu.load_model("PATH_OF_THIS_FOLDER")'
        if format == "lqedu":
            code += (
                "\n\n# or with transformers\nimport lqedu.integrations.transformers\n"
                "from transformers import AutoModelForCausalLM\n\n"
                'model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")'
            )
    else:
        code = (
            f"# pip install transformers {package}\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'folder = "PATH_OF_THIS_FOLDER"\n'
            "model = AutoModelForCausalLM.from_pretrained(folder)\ntokenizer = AutoTokenizer.from_pretrained(folder)"
        )
    if format == "compressed-tensors":  # transformers has no place for packed zero points; vLLM has
        code += (
            "\n\n# weights with zero points have to be unpacked when transformers loads them:\n"
            "# from transformers import CompressedTensorsConfig\n"
            "# AutoModelForCausalLM.from_pretrained(folder, quantization_config=CompressedTensorsConfig(dequantize=True))"
        )
    return f"```python\n{code}\n```"


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    """One line of a Markdown table, whatever a name or a note holds."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def _base(facts: Facts) -> str:
    return facts.base_model or "A dense model that is not known"


def shown_name(name: str | Path) -> str:
    """A name that may be shown: a Hub id or a corpus as it is, of a path the last part."""
    name = str(name)
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else Path(name).name


def _check_types(facts: Any) -> None:
    """Refuse (TypeError) a field that does not hold what it is declared as."""
    for name, kind in get_type_hints(type(facts)).items():
        kinds = get_args(kind) or (kind,)
        value = getattr(facts, name)
        if get_origin(kind) is not tuple and type(value) not in kinds and not (type(value) is int and float in kinds):
            raise TypeError(f"{name} holds {value!r}")
