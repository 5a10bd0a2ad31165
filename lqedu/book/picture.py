"""The README's picture, drawn from the recorded measurement: ``python -m lqedu.book.picture``.

It reads ``book/results/weight_only_smollm2.json`` and writes ``book/_static/perplexity.svg``; a test compares the
labels in the committed picture with the file.
"""

from pathlib import Path
from typing import Any

from lqedu.book.results import results
from lqedu.viz import PALETTE, figure

SERIES = {"RTN": ("orange", "s", "--"), "GPTQ": ("blue", "o", "-")}
ALT_TEXT = "Perplexity against stored bits per weight: GPTQ stays below rounding to nearest at 3 and 4 bits."


def series(rows: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """(bits per weight, perplexity) of RTN and of GPTQ in activation order, groups of 64, at 3 and 4 bits."""
    chosen = [row for row in rows if row.get("group_size") == 64 and row["search"] == "none" and row["bits"] in (3, 4)]
    kinds = {"RTN": lambda row: row["method"] == "rtn", "GPTQ": lambda row: row.get("order") == "activation"}
    return {
        name: sorted((row["bits_per_weight"], row["ppl"]) for row in chosen if wanted(row))
        for name, wanted in kinds.items()
    }


def label(ppl: float) -> str:
    """How the picture writes a perplexity."""
    return f"{ppl:.1f}"


def main(path: Path = Path("book/_static/perplexity.svg")) -> None:
    """Draw the picture."""
    import matplotlib

    rows = results("weight_only_smollm2")["values"]
    dense = rows[0]["ppl"]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lqedu", "font.family": "sans-serif"}):
        drawing, ax = figure(height=2.6)
        ax.axhline(dense, color=PALETTE["grey"], linestyle=":")
        ax.annotate(f"dense {label(dense)}", (3.3, dense), xytext=(0, -14), textcoords="offset points")
        for name, points in series(rows).items():
            color, marker, dash = SERIES[name]
            ax.plot(*zip(*points, strict=True), color=PALETTE[color], marker=marker, linestyle=dash, label=name)
            for bits, ppl in points:
                ax.annotate(
                    label(ppl), (bits, ppl), xytext=(8, 4 if name == "RTN" else -16), textcoords="offset points"
                )
        ax.set(
            xlabel="bits per weight, scales and zero points counted", ylabel="perplexity", yscale="log", ylim=(20, 80)
        )
        ax.set_yticks([20, 30, 40, 60, 80], ["20", "30", "40", "60", "80"])
        ax.minorticks_off()
        ax.set_title("SmolLM2-135M on unseen text: rounding to nearest against GPTQ", loc="left", fontsize=11)
        ax.legend(frameon=False)
        ax.margins(x=0.1)
        drawing.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
