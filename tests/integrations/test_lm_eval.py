"""The model class of lm-eval: its pure parts anywhere, the class around a stand-in, and a task where lm-eval is installed."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import lqedu.integrations.lm_eval as integration
from lqedu import cli
from lqedu.checkpoint import save
from lqedu.errors import LqeduError, MissingDependencyError, UsageError
from lqedu.evaluation import load_task, score
from lqedu.methods import RTN
from lqedu.methods.pipeline import quantize
from lqedu.models import load_model
from lqedu.runtime.packed import PackedLinear
from tests.models_tiny import tiny_model, tiny_windows

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install lm-eval"
)
WORDS = [f"w{index}" for index in range(120)]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<s>", pad_token="<s>")
    return save(quantize(tiny_model(), RTN(group_size=32)), tmp_path / "model", tokenizer)


def test_a_folder_is_loaded_as_load_model_does(saved: Path) -> None:
    model, tokenizer = integration.load(str(saved), device="cpu")
    with torch.no_grad():
        assert torch.equal(model(tiny_windows()).logits, load_model(saved)[0](tiny_windows()).logits)
    assert tokenizer("w3").input_ids == [5]
    assert integration.load(str(saved), device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16
    assert integration.load(str(saved), device="cpu", dtype=torch.float16)[0].dtype == torch.float16


def test_kernels_are_run_where_asked(saved: Path) -> None:
    pytest.importorskip("triton", reason="the layouts of kernels are defined in lqedu_kernels, which needs Triton")
    model, _ = integration.load(str(saved), device="cpu", dtype="float32", kernels=True)
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    with torch.no_grad():
        expected = load_model(saved)[0](tiny_windows()).logits
        assert (model(tiny_windows()).logits - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu_kernels_run_by_themselves(saved: Path) -> None:
    model, _ = integration.load(str(saved))
    assert model.device.type == "cuda" and model.dtype == torch.float16 and model.lqedu_kernels
    assert not hasattr(integration.load(str(saved), kernels=False)[0], "lqedu_kernels")


@pytest.mark.parametrize(
    ("ask", "match"),
    [
        ({"dtype": "int8"}, "dtype is one of float32"),
        ({"device": "nothing"}, "unknown device"),
        ({"pretrained": "not/here/at/all"}, "no model 'not/here"),
    ],
)
def test_what_cannot_be_loaded_is_refused(saved: Path, ask: dict, match: str) -> None:
    with pytest.raises(LqeduError, match=match):
        integration.load(**{"pretrained": str(saved), "device": "cpu"} | ask)


def test_kernels_of_a_dense_model_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(integration, "load_model", lambda *a, **k: (tiny_model(), None))
    with pytest.raises(UsageError, match="is dense"):
        integration.load("dense", device="cpu", kernels=True)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"pretrained": "a", "peft": "b"}, "no argument 'peft'"),
        ({"pretrained": "a", "trust_remote_code": True}, "no argument 'trust_remote_code'"),
        ({"pretrained": "a", "batch_size": 1}, "no argument 'batch_size'"),
        ({"dtype": "float16"}, "pretrained=FOLDER"),
    ],
)
def test_arguments_that_would_be_ignored_are_refused(given: dict, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        integration.arguments(given, {"max_length", "peft"})


@pytest.fixture
def fresh_registration():
    integration.register.cache_clear()
    yield
    integration.register.cache_clear()


def test_without_lm_eval_one_sentence_says_what_to_install(monkeypatch, fresh_registration, capsys) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    with pytest.raises(MissingDependencyError, match="pip install lm-eval"):
        integration.register()
    with pytest.raises(SystemExit) as exit_:
        integration.main()
    assert exit_.value.code == 2 and "pip install lm-eval" in capsys.readouterr().err


def test_the_class_hands_model_and_options_to_lm_eval(saved: Path, monkeypatch, fresh_registration) -> None:
    registered, received = {}, {}

    class HFLM:
        def __init__(
            self, pretrained, backend="default", tokenizer=None, batch_size=1, max_length=None, **kwargs
        ) -> None:
            received.update(
                pretrained=pretrained, backend=backend, tokenizer=tokenizer, batch_size=batch_size, **kwargs
            )

    def register_model(*names):
        return lambda cls: registered.setdefault(names[0], cls)

    for name, content in {
        "lm_eval": {}, "lm_eval.api": {}, "lm_eval.models": {}, "lm_eval.api.registry": {"register_model": register_model},
        "lm_eval.models.huggingface": {"HFLM": HFLM},
    }.items():  # fmt: skip
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    cls = integration.register()
    assert integration.register() is cls is registered["lqedu"] and issubclass(cls, HFLM)
    cls(pretrained=str(saved), device="cpu", batch_size=3)
    assert received["batch_size"] == 3 and received["backend"] == "causal" and set(received) == {
        "pretrained", "backend", "tokenizer", "batch_size",
    }  # fmt: skip
    with torch.no_grad():
        assert torch.equal(received["pretrained"](tiny_windows()).logits, load_model(saved)[0](tiny_windows()).logits)
    with pytest.raises(UsageError, match="no argument 'max_batch_size'"):
        cls(pretrained=str(saved), max_batch_size=3)


def test_scores_are_the_numbers_of_each_task(monkeypatch) -> None:
    asked = {}

    class TaskManager:
        def match_tasks(self, names: list[str]) -> list[str]:
            return [name for name in names if name == "piqa"]

    def simple_evaluate(**arguments: object) -> dict:
        asked.update(arguments)
        return {"results": {"piqa": {"alias": "piqa", "acc,none": 0.5, "acc_stderr,none": "N/A", "sample_len": 4}}}

    for name, content in {
        "lm_eval": {"simple_evaluate": simple_evaluate}, "lm_eval.tasks": {"TaskManager": TaskManager},
    }.items():  # fmt: skip
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(integration, "register", lambda: lambda **given: given)
    scores = integration.evaluate("folder", ["piqa"], batch_size=8, limit=4)
    assert scores == {"piqa": {"acc,none": 0.5, "sample_len": 4}}
    assert asked["model"] == {"pretrained": "folder", "batch_size": 8} and asked["limit"] == 4
    with pytest.raises(UsageError, match="no task 'pica'"):
        integration.evaluate("folder", ["piqa", "pica"])


def eval_command(monkeypatch, capsys, *options: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["lqedu", "eval", *options])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code or 0, *capsys.readouterr()


def test_the_command_eval_prints_tasks_of_lm_eval(monkeypatch, capsys) -> None:
    asked = []

    def evaluate(model: str, tasks: list[str], **options: int) -> dict:
        asked.append(options)
        return {task: {"acc,none": 0.25} for task in tasks}

    monkeypatch.setattr(integration, "register", lambda: None)
    monkeypatch.setattr(integration, "evaluate", evaluate)
    status, out, _ = eval_command(monkeypatch, capsys, "folder", "--tasks", "sciq, mmlu", "--json")
    assert status == 0
    assert json.loads(out) == {"model": "folder", "tasks": {"sciq": {"acc,none": 0.25}, "mmlu": {"acc,none": 0.25}}}
    status, out, _ = eval_command(monkeypatch, capsys, "folder", "--tasks", "sciq", "--items", "3")
    assert status == 0 and "0.2500" in out and asked == [{}, {"limit": 3}]


def piqa(path: Path, count: int) -> str:
    """A file of the task; its words are those of the fixture's tokenizer."""
    rows = [{"goal": f"w{i} w2", "sol1": f"w{2 * i}", "sol2": f"w{2 * i + 1} w3", "label": i % 2} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_the_command_eval_scores_its_own_tasks_without_lm_eval(
    saved: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    file = piqa(tmp_path / "piqa.jsonl", 7)
    model, tokenizer = load_model(saved)
    expected = score(model, tokenizer, load_task(file, limit=5))
    status, out, _ = eval_command(monkeypatch, capsys, str(saved), "--tasks", file, "--items", "5", "--json")
    found = json.loads(out)["tasks"]["piqa"]
    assert status == 0 and found["items"] == 5 and found["items_sha256"] == expected.items_sha256
    assert found["acc"] == expected.acc and found["acc_norm_stderr"] == expected.acc_norm_stderr
    assert found["gold_nll"] == pytest.approx(expected.gold_nll, rel=1e-3) and found["truncated"] == 0
    status, out, _ = eval_command(monkeypatch, capsys, str(saved), "--tasks", file)
    assert status == 0 and "gold_nll" in out and "acc_norm" in out and "sha256" not in out


def test_the_command_eval_mixes_both(saved: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    lambada = tmp_path / "lambada.jsonl"
    lambada.write_text(json.dumps({"text": "w1 w2 w3"}))
    monkeypatch.setattr(integration, "register", lambda: None)
    monkeypatch.setattr(integration, "evaluate", lambda model, tasks: {task: {"acc,none": 0.25} for task in tasks})
    status, out, _ = eval_command(monkeypatch, capsys, str(saved), "--tasks", f"sciq,{lambada}", "--json")
    scores = json.loads(out)["tasks"]
    assert status == 0 and list(scores) == ["lambada", "sciq"]
    assert "acc_norm" not in scores["lambada"] and scores["lambada"]["acc_stderr"] is None  # one item has no error


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--tasks", " , "], "--tasks names no task"),
        (["--tasks", "nothing/piqa.jsonl"], "cannot read nothing/piqa.jsonl"),
        (["--tasks", "sciq,nothing/piqa.jsonl"], "pip install lm-eval"),
        (["--tasks", "nope"], "'nope' is no task of ours (piqa, arc_easy,"),
        (["--items", "3"], "--items says how many items of --tasks"),
    ],
)
def test_the_command_eval_refuses_before_it_loads_a_model(
    options, match, monkeypatch, capsys, fresh_registration
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    status, out, error = eval_command(monkeypatch, capsys, "no/model/here", *options)
    assert status == 2 and not out and match in error


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")  # of its packages
def test_a_task_runs_and_scores_what_the_model_says(saved: Path, tmp_path: Path, fresh_registration) -> None:
    """Multiple choice on a file of ours: lm-eval's accuracy is that of the choices' log-likelihoods, computed here."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(12):
        ids = torch.randint(0, len(WORDS), (8,), generator=generator).tolist()
        words = [WORDS[i] for i in ids]
        rows.append({"text": " ".join(words[:5]), "choices": words[5:], "label": ids[0] % 3})
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "tiny.yaml").write_text(
        f"""task: lqedu_tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc}}]
"""
    )
    integration.register()
    results = lm_eval.simple_evaluate(
        model="lqedu", model_args=f"pretrained={saved},device=cpu,dtype=float32", tasks=["lqedu_tiny"], batch_size=4,
        task_manager=TaskManager(include_path=str(tasks)), bootstrap_iters=0, log_samples=True,
    )  # fmt: skip
    model, tokenizer = load_model(saved)
    right = 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer(f"{row['text']} {choice}").input_ids])
            with torch.no_grad():
                scores.append(model(ids).logits[0, -2].log_softmax(-1)[ids[0, -1]].item())
        right += max(range(3), key=scores.__getitem__) == row["label"]
    assert results["results"]["lqedu_tiny"]["acc,none"] == pytest.approx(right / len(rows))
    assert results["config"]["model"] == "lqedu"
    ask = dict(device="cpu", task_manager=TaskManager(include_path=str(tasks)))
    assert integration.evaluate(str(saved), ["lqedu_tiny"], **ask)["lqedu_tiny"]["acc,none"] == pytest.approx(
        right / 12
    )
    with pytest.raises(UsageError, match="no task 'lqedu_nothing'"):
        integration.evaluate(str(saved), ["lqedu_nothing"], **ask)


@needs_lm_eval
def test_the_command_line_lists_tasks() -> None:
    import subprocess

    done = subprocess.run(
        [sys.executable, "-m", "lqedu.integrations.lm_eval", "--help"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode == 0 and "model_args" in done.stdout + done.stderr) or "run" in done.stdout
