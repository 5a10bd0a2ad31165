"""Let lm-eval ask and score, and keep what it said: prompts of all eight tasks, and the first items of four, on the bench model.

Run in the environment of requirements.txt plus lm-eval, from the repository root:
``peers/bin/pip install lm-eval==0.4.13`` and ``PYTHONPATH=. peers/bin/python tests/parity/make_zeroshot_goldens.py data/zeroshot``,
where the folder holds piqa.jsonl, arc_easy.jsonl, arc_challenge.jsonl and hellaswag.jsonl. Writes goldens/zeroshot.json. Of the
data sets it keeps numbers only; ROWS, which the tests run, are our own. lm-eval's task files are used as they are, but for
where the data lie; files with finished HellaSwag queries skip its ``process_docs``. ``tests/parity/compare_zeroshot.py`` compares.
"""

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import lqedu
from lqedu.models import weights_sha256

ROOT = Path(lm_eval.__file__).parent / "tasks"
TASKS = {
    "piqa": "piqa/piqa.yaml", "arc_easy": "arc/arc_easy.yaml", "arc_challenge": "arc/arc_challenge.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml", "winogrande": "winogrande/default.yaml",
    "lambada": "lambada/lambada_openai.yaml", "boolq": "super_glue/boolq/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}  # fmt: skip
LONG = ("piqa", "arc_easy", "arc_challenge", "hellaswag")
LABELS = ["A", "B", "C", "D", "E"]
ROWS: dict[str, list[dict[str, Any]]] = {  # with the Hub's columns, and what is odd in them
    "piqa": [
        {"goal": "How do you keep bread fresh?", "sol1": "Store it in a closed box.", "sol2": "Store it under water.", "label": 0},
        {"goal": "clean a window ", "sol1": " wipe it with  a damp cloth", "sol2": "paint it — twice", "label": 0},
    ],
    "arc_easy": [
        {
            "question": "Which of these melts in the sun?", "answerKey": "C",
            "choices": {"text": ["a stone", "a spoon", "an ice cube", "a brick"], "label": LABELS[:4]},
        },
        {"question": "What do plants need?", "choices": {"text": ["light", "paint", "noise"], "label": ["1", "2", "3"]}, "answerKey": "1"},
    ],
    "arc_challenge": [
        {
            "question": "A ball is thrown straight up. What is its speed at the highest point?\n", "answerKey": "B",
            "choices": {"text": ["9.8 m/s", "zero", "the speed of light", "It grows."], "label": LABELS[:4]},
        },
    ],
    "hellaswag": [
        {
            "activity_label": "Making tea", "ctx_a": "[header] How to make tea [title] Boil the water.",
            "ctx_b": "THE cook then", "label": "2",
            "endings": [
                "throws the cup away.", "drinks  the kettle. [step] It is hot.", "pours it over the leaves.", " sings [to] the tea.",
            ],
        },
        {
            "activity_label": "Swimming", "ctx_a": "A woman stands at a pool.", "ctx_b": "", "label": "0",
            "endings": ["She jumps in.", "She eats it.", "It jumps in.", "The pool stands up."],
        },
    ],
    "winogrande": [
        {"sentence": "The trophy did not fit in the case because _ was too large.", "option1": "the trophy", "option2": "the case", "answer": "1"},
        {"sentence": "Ann asked Beth for help, and _ said yes .", "option1": "Ann", "option2": "Beth", "answer": "2"},
    ],
    "lambada": [
        {"text": "He opened the door with his key, and when he had closed it again he put it back into his pocket, the old brass key"},
        {"text": "She counted one , two , three and then said four"},
    ],
    "boolq": [
        {"question": "is ice lighter than water", "passage": "Ice -- Ice is water that is frozen. It floats on water.", "label": 1},
    ],
    "openbookqa": [
        {"question_stem": "A frog's eggs are laid in", "choices": {"text": ["sand", "water", "trees", "snow"], "label": LABELS[:4]}, "answerKey": " B"},
    ],
}  # fmt: skip


def task(name: str, file: Path, folder: Path, **changes: Any) -> str:
    """lm-eval's task on a file of ours, written into a folder; its name."""
    config = {"task": f"lqedu_{name}", "dataset_path": "json", "dataset_name": None, "include": str(ROOT / TASKS[name])}
    config["dataset_kwargs"] = {"data_files": dict.fromkeys(("train", "validation", "test"), str(file))}
    (folder / f"{name}.yaml").write_text(json.dumps(config | changes))  # JSON is YAML
    return config["task"]


def run(model: HFLM, names: dict[str, str], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What lm-eval asked of the model and made of the answers, by task and item."""
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(names.values()), task_manager=TaskManager(include_path=str(folder)),
        bootstrap_iters=0, log_samples=True,
    )  # fmt: skip
    kept = {}
    for name, theirs in names.items():
        samples = sorted(found["samples"][theirs], key=lambda sample: sample["doc_id"])
        kept[name] = [
            {
                "requests": [list(arguments) for arguments in sample["arguments"]],
                "log_likelihoods": [round(float(answer[0]), 4) for answer in sample["filtered_resps"]],
                "acc": int(sample["acc"]),
            }
            | ({"acc_norm": int(sample["acc_norm"])} if "acc_norm" in sample else {})
            for sample in samples
        ]
    return kept


def long_rows(file: Path, count: int) -> list[dict[str, Any]]:
    """The first rows of a file; lists with an index become the columns that lm-eval's task reads."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:count] if line]
    for row in rows:
        if "question" in row and isinstance(row["choices"], list):
            labels = LABELS[: len(row["choices"])]
            row |= {"choices": {"text": row["choices"], "label": labels}, "answerKey": labels[row["gold"]]}
        elif "query" in row:
            row["label"] = row["gold"]
    return rows


def main() -> None:
    """Ask, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument(
        "--parts", nargs="+", choices=["rows", *LONG], default=["rows", *LONG], help="the others are kept"
    )
    given = parser.parse_args()
    model, tokenizer = lqedu.load_model("smollm2-135m")
    peer = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=8)
    path = Path(__file__).parent / "goldens" / "zeroshot.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"long": {}}
    kept["versions"] = {package: version(package) for package in ("lm_eval", "torch", "transformers")}
    kept["weights_sha256"] = weights_sha256(model)
    for part in given.parts:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            rows = ROWS if part == "rows" else {part: long_rows(given.data / f"{part}.jsonl", given.items)}
            names = {}
            for name, content in rows.items():
                file = folder / f"{name}.jsonl"
                file.write_text("".join(json.dumps(row) + "\n" for row in content))
                skip = {"process_docs": None} if "query" in content[0] else {}
                names[name] = task(name, file, folder, **skip)
            found = run(peer, names, folder)
        if part == "rows":
            kept |= {"rows": ROWS, "peer": found}
        else:  # the words of a data set are not ours to keep
            columns = ("log_likelihoods", "acc", "acc_norm")
            kept["long"][part] = {column: [item[column] for item in found[part]] for column in columns}
        path.write_text(json.dumps(kept, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{part}: {sum(map(len, found.values()))} items", flush=True)


if __name__ == "__main__":
    main()
