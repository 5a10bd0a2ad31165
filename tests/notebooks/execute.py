"""Run notebooks again, in place, and clean them: ``make execute CHAPTER=04-gptq``, or all of them.

A notebook that fails is left as it was. Cells tagged ``nbval-skip`` need a GPU: without one they keep their outputs.
"""

import os
import shutil
import sys
import time
from pathlib import Path

import nbformat
from clean import clean, write
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 600  # seconds a cell; the book promises far less, but the first run may fetch the model


class _Client(NotebookClient):
    """Tells where it is, and leaves recorded cells alone where there is no GPU."""

    has_gpu = shutil.which("nvidia-smi") is not None

    async def async_execute_cell(self, cell, cell_index, *args, **kwargs):
        if cell.cell_type != "code":
            return cell
        if "nbval-skip" in cell.metadata.get("tags", []) and not self.has_gpu:
            return cell
        first = next((line for line in cell.source.splitlines() if line.strip()), "")
        print(f"    cell {cell_index}/{len(self.nb.cells) - 1}: {first[:80]}", flush=True)
        return await super().async_execute_cell(cell, cell_index, *args, **kwargs)


def run(path: Path) -> float:
    """Execute one notebook in its own folder; seconds it took."""
    notebook = nbformat.read(path, as_version=4)
    client = _Client(
        notebook, timeout=TIMEOUT, kernel_name="python3", record_timing=False, store_widget_state=False,
        resources={"metadata": {"path": str(path.parent)}},
    )  # fmt: skip
    began = time.perf_counter()
    client.execute()
    for count, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), 1):
        cell["execution_count"] = count
        for output in cell.outputs:
            if "execution_count" in output:
                output["execution_count"] = count
    write(clean(notebook), path)
    return time.perf_counter() - began


def main(names: list[str]) -> int:
    chapters = ROOT / "book" / "chapters"
    if names in ([], ["all"]):
        paths = sorted(chapters.glob("*.ipynb"))
    else:
        paths = [Path(n) if n.endswith(".ipynb") else chapters / f"{n}.ipynb" for n in names]
    for path in paths:
        if not path.is_file():
            there = ", ".join(p.stem for p in sorted(chapters.glob("*.ipynb")))
            print(f"no chapter {path.stem}; there are: {there}", file=sys.stderr)
            return 2
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    for path in paths:
        print(f"==> {path.stem}", flush=True)
        try:
            print(f"    {run(path):.0f} s", flush=True)
        except CellExecutionError as error:
            print(f"{path.stem} was left as it was: a cell failed\n{error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
