"""The smallest chapter that passes every gate: what the gates' tests then spoil, one thing at a time."""

import base64
import struct
import zlib

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests.notebooks.clean import KERNEL
from tests.site.check import SETUP, SPINE

SENTENCE = "A weight is rounded to the nearest point of a grid, and the error that remains is what this page measures. "


def png(width: int = 2, height: int = 2) -> str:
    """A white picture, in base64."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + b"\xff" * width for _ in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + parts).decode()


def good_chapter(chapter: str = "04-gptq", version: str = "0.1.0") -> nbformat.NotebookNode:
    """A chapter in which nothing is true and everything is in its place."""
    colab = f"https://colab.research.google.com/github/lqedu/lqedu/blob/v{version}/book/chapters/{chapter}.ipynb"
    cells = [
        new_markdown_cell(
            f"({chapter})=\n# A claim\n\nA promise.\n\n[Open in Colab]({colab}) · runs on a CPU · about 5 s"
        )
    ]

    def text(source: str) -> None:
        cells.append(new_markdown_cell(source))

    def code(source: str, *outputs: nbformat.NotebookNode, **metadata: object) -> None:
        cells.append(new_code_cell(source, outputs=list(outputs), metadata=metadata))

    for title in SPINE:
        body = SENTENCE * 4
        if title == "At a glance":
            body = "**You will be able to** round. **You need** numbers. **You will build** a function. **Not covered**: more."
        elif title == "The problem, measured":
            body += "\n\n:::{admonition} Predict first\n:class: predict\nWhich is larger?\n:::"
        elif title == "The idea":
            body += (
                "\n\n### A grid\n\n"
                + SENTENCE * 90
                + f"\n\n$$ \\hat w = s (q - z) $$ (eq-{chapter}-grid)\n\nsee {{eq}}`eq-{chapter}-grid`"
            )
        elif title == "See it":
            body += "\n\n1. What moves?\n2. What stays?"
        elif title == "Exercises":
            text(f"## {title}\n\n" + SENTENCE)
            for n in range(1, 5):
                text(f":::{{exercise}} Number {n}\n:label: ex-{chapter}-{n}\n\nImplement it.\n:::")
                code(f'def answer_{n}(w):\n    ...\n\n\nlqedu.book.check("{chapter}.{n}", answer_{n})')
            continue
        elif title == "Solutions":
            text(f"## {title}")
            for n in range(1, 5):
                text(f"::::{{solution-start}} ex-{chapter}-{n}\n:class: dropdown\n::::")
                passed = new_output("stream", name="stdout", text=f"{chapter}.{n}: passed\n")
                code(f'def answer_{n}(w):\n    return w\n\n\nlqedu.book.check("{chapter}.{n}", answer_{n})', passed)
                text(":::{solution-end}\n:::")
            continue
        elif title == "Further reading":
            items = "\n".join(
                f"- {{cite:t}}`{key}`, a line."
                for key in ("frantar2023gptq", "lin2024awq", "chee2023quip", "badri2023hqq")
            )
            text(f"## {title}\n\n{items}\n\n**Next:** the end")
            continue
        text(f"## {title}\n\n{body}")
        if title == "Setup":
            code(SETUP.format(version=version))
        elif title == "Build it":
            for n in range(12):
                code(f'def double_{n}(w: float) -> float:\n    """Twice ``w``."""\n    return 2 * w')
        elif title == "On a model":
            for n in range(5):
                picture = new_output("display_data", {"image/png": png(64, 32), "text/plain": "<Figure>"})
                code(
                    f"plot({n})",
                    picture,
                    mystnb={
                        "image": {
                            "alt": f"The error falls with every bit, from 0.4 at 2 bits to 0.01 at 8 bits, case {n}"
                        },
                        "figure": {"name": f"fig-{chapter}-case-{n}", "caption": f"Error over bits, case {n}."},
                    },
                )
        elif title == "See it":
            html = (
                '<figure class="lqedu-explorer"><label>b <input type="range" oninput="this.closest(\'figure\')'
                ".querySelector('text').textContent = this.value\"></label>"
                '<svg viewBox="0 0 100 20"><text y="15">50</text></svg></figure>'
            )
            code("explorer", new_output("display_data", {"text/html": html, "text/plain": "an explorer"}))
    count = 0
    for cell in cells:
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
    notebook = new_notebook(cells=cells)
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    return notebook
