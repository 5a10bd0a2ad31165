"""Remove from notebooks what differs from run to run: ``python tests/notebooks/clean.py FILE ...``.

What stays: sources, outputs, execution counts, tags, and the alt texts and captions under ``mystnb``. Figures keep their
pixels in a palette of 256 colours, a third of the bytes: the repository and a phone have to carry them.
"""

import base64
import io
import sys
from pathlib import Path

import nbformat
from PIL import Image

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
_WIDGET = "application/vnd.jupyter.widget"


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without timings, widget state, editor settings and versions; changed in place."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k in ("tags", "mystnb")})
        for output in cell.get("outputs", []):
            if "data" in output:  # of its metadata: the size of a picture, and the name of a glued value
                kept = {
                    k: v for k, v in output.get("metadata", {}).items() if k.startswith("image/") or k == "scrapbook"
                }
                output["metadata"] = nbformat.from_dict(kept)
                output["data"] = nbformat.from_dict(
                    {k: v for k, v in output["data"].items() if not k.startswith(_WIDGET)}
                )
                if "image/png" in output["data"]:
                    output["data"]["image/png"] = with_palette(output["data"]["image/png"])
    return notebook


def with_palette(png: str) -> str:
    """A picture in base64 with at most 256 colours, or as it is where that is smaller."""
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    if picture.mode == "P":
        return png
    file = io.BytesIO()
    picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return min(png, base64.b64encode(file.getvalue()).decode(), key=len)


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write with a final newline, as git likes it."""
    nbformat.validate(notebook)
    path.write_text(nbformat.writes(notebook).rstrip("\n") + "\n", encoding="utf-8")


def main(names: list[str]) -> int:
    for name in names:
        path = Path(name)
        write(clean(nbformat.read(path, as_version=4)), path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
