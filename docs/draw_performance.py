"""Write the tables of the page "Performance" and draw its figure, from docs/performance/*.json.

python docs/draw_performance.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "benchmarks"))

from harness import cell  # noqa: E402

PAGE = HERE / "performance.md"
BLOCK = re.compile(r"(<!-- result: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
BASE, OURS, CHUNKS, PLAIN = "#7f7f7f", "#1f77b4", "#17becf", "#ff7f0e"
SHOWN = {  # of each result: the heading of a column, and what it shows
    "loss-step": {
        "batch": "{batch}",
        "base loss": "{base loss ms} ms",
        "S2SDLoss": "{S2SDLoss ms} ms",
        "plain equations": "{plain ms} ms",
        "S2SDLoss / base": "{S2SDLoss / base} ({its quartiles})",
        "S2SDLoss / plain": "{S2SDLoss / plain} ({quartiles of that})",
        "memory: base, S2SDLoss, plain": "{base loss MiB}, {S2SDLoss MiB}, {plain MiB} MiB",
    },
    "full-step": {
        "pixels": "{pixels}",
        "base loss": "{base loss ms} ms",
        "S2SDLoss": "{S2SDLoss ms} ms",
        "S2SDLoss / base": "{S2SDLoss / base} ({quartiles})",
    },
    "launches": {
        "loss": "{loss}",
        "base loss": "{base loss}",
        "S2SDLoss": "{S2SDLoss}",
        "ratio": "{ratio}",
        "reads: base, S2SDLoss": "{reads of the base loss}, {reads of S2SDLoss}",
    },
    "memory": {
        "batch": "{batch}",
        "plain equations": "{plain MiB} MiB",
        "all rows": "{whole MiB} MiB ({whole / plain memory})",
        "`chunk_size=256`": "{chunks MiB} MiB ({chunks / plain memory})",
    },
}
NO_GPU = """There are no numbers yet: the core was rewritten since the last measurements on a GPU,
and none was available afterwards.
"""


def result(name: str) -> dict[str, Any] | None:
    """A saved result, or None where it was not measured."""
    path = HERE / "performance" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def table(name: str) -> str:
    """A result in Markdown, with its command and its machine; "cuda": all of a GPU."""
    if name == "cuda":
        parts = [table(f"{kind}-cuda") for kind in SHOWN if result(f"{kind}-cuda")]
        return "\n".join(parts) or NO_GPU
    found = result(name)
    if found is None:
        return "Not measured with this version.\n"
    kind = name.removesuffix("-cuda")
    shown = SHOWN[kind]
    if any(row.get("mode", "eager") != "eager" for row in found["rows"]):
        shown = {"mode": "{mode}", **shown}
    lines = [list(shown), ["---"] * len(shown)]
    lines += [[filled(text, row) for text in shown.values()] for row in found["rows"]]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    machine = [found["machine"]["device"]]
    machine += [f"{name} {found['machine'][name]}" for name in ("torch", "pytorch-metric-learning")]
    return f"{rows}\n\n`{found['command']}`\n({', '.join(machine)})\n"


def filled(text: str, row: dict[str, Any]) -> str:
    """A text with the row's values in the place of their names in braces."""
    return re.sub(r"\{(.*?)\}", lambda match: cell(row[match[1]]), text)


def rewritten(page: str) -> str:
    """The page with its tables rewritten."""
    return BLOCK.sub(lambda m: f"{m[1]}\n{table(m[2])}\n{m[3]}", page)


def step(ax: Axes, rows: list[dict[str, Any]]) -> None:
    """Time of a loss step over that of the base loss."""
    for i, row in enumerate(rows):
        base = row["base loss ms"]
        for j, (name, color) in enumerate(
            (("base loss", BASE), ("S2SDLoss", OURS), ("plain", PLAIN))
        ):
            height, x = row[f"{name} ms"] / base, i + 0.28 * (j - 1)
            label = {"plain": "plain equations"}.get(name, name) if i == 0 else None
            ax.bar(x, height, 0.26, color=color, label=label)
            ax.text(x, height, cell(row[f"{name} ms"]), ha="center", va="bottom", fontsize=8)
    ax.set_xticks(range(len(rows)), [f"batch {row['batch']}" for row in rows])
    ax.set_ylabel("time / that of the base loss (labels: ms)")
    ax.set_title("Loss step: MultiSimilarity with miner, paper's heads")
    ax.legend(frameon=False)


def memory(ax: Axes, rows: list[dict[str, Any]]) -> None:
    """Peak memory of distillation against batch size."""
    batches = [row["batch"] for row in rows]
    for name, label, color in (
        ("whole", "relation_kl", OURS),
        ("plain", "plain equations", PLAIN),
        ("chunks", "relation_kl, chunk_size=256", CHUNKS),
    ):
        ax.plot(batches, [row[f"{name} MiB"] for row in rows], "o-", color=color, label=label)
    ax.set(xscale="log", yscale="log", xlabel="batch size", ylabel="peak memory, MiB")
    ax.set_xticks(batches, map(str, batches))
    ax.minorticks_off()
    ax.set_title("Memory of distillation, 5 teachers")
    ax.legend(frameon=False)


def draw(path: Path) -> None:
    """A panel for each result that is there."""
    grey = dict.fromkeys(  # legible on the light and on the dark page
        "text.color axes.labelcolor axes.edgecolor xtick.color ytick.color".split(), "#757575"
    )
    plt.rcParams.update(grey)
    panels = [(panel, found) for panel in (step, memory) if (found := result(RESULTS[panel]))]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4), layout="constrained", squeeze=False
    )
    for (panel, found), ax in zip(panels, axes.flat, strict=True):
        panel(ax, found["rows"])
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, transparent=True)


RESULTS = {step: "loss-step", memory: "memory"}


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    draw(HERE / "images" / "performance.png")
