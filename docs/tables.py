"""Write the tables of README and docs anew from the result files: python docs/tables.py

`docs/results/NAME.md` is the table of `NAME.csv`. In the pages the text between
`<!-- table: NAME -->` and `<!-- end -->` is what the function of that name returns here.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "examples"))

from study import summary  # noqa: E402

PERFORMANCE = DOCS / "performance.md"  # draw_performance.py writes its tables
PAGES = [DOCS.parent / "README.md", *sorted({*DOCS.glob("*.md")} - {PERFORMANCE})]
BLOCK = re.compile(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


def rows(name: str, **where: Any) -> list[summary.Row]:
    """The rows of a result file, those with the values in ``where``."""
    with open(DOCS / "results" / f"{name}.csv", newline="") as file:
        found = list(csv.DictReader(file))
    return [
        {**row, "size": int(row["size"]), summary.METRIC: float(row[summary.METRIC])}
        for row in found
        if all(row[column] == str(value) for column, value in where.items())
    ]


def difference(found: list[summary.Row], method: str, size: int, bold: bool = False) -> str:
    """Method minus base at the same seeds; bold where the interval, as printed, leaves 0 out."""
    paired = summary.differences(found, method, size)
    if not paired:
        return ""
    mean, half = summary.interval(paired)
    text = f"{mean:+.1f} ± {half:.1f}"
    return f"**{text}**" if bold and round(abs(mean), 1) > round(half, 1) else text


def table(head: list[str], lines: list[list[str]]) -> str:
    """Numbers to the right, names to the left."""
    head = [" | ".join(head), " | ".join(["---", *["---:"] * (len(head) - 1)])]
    return "".join(f"| {line} |\n" for line in [*head, *map(" | ".join, lines)])


def gains() -> str:
    """What the recipe gains, by embedding size."""
    emoji, icons, sizes = rows("emoji"), rows("icons-400"), (8, 16, 32, 64, 128)
    lines = [
        ("emoji, pretrained EfficientNet-lite0, 320 steps", emoji, "MSDF, small-data"),
        ("the same, then an embedder fitted anew", emoji, "MSDF, small-data, refitted embedder"),
        ("icons-400, small network from scratch, 400 steps", icons, "MSDF, small-data"),
        ("the same with MSDFA", icons, "MSDFA, small-data"),
    ]
    return table(
        ["embedding size", *map(str, sizes)],
        [[what, *(difference(of, m, size, bold=True) for size in sizes)] for what, of, m in lines],
    )


def validation() -> str:
    """What one layer or two and MSDF or MSDFA gain on validation classes."""
    emoji = rows("emoji-gpu-validation")
    losses = "icons-400-losses-validation"
    columns = {
        "MultiSimilarity, icons-400, 16": (rows("icons-400-msdfa-validation"), 16),
        "emoji, 16": (emoji, 16),
        "emoji, 32": (emoji, 32),
        "Triplet, icons-400, 16": (rows(losses, loss="TripletMarginLoss"), 16),
        "Margin, icons-400, 16": (rows(losses, loss="MarginLoss"), 16),
    }
    methods = {
        "MSDF, two layers": "MSDF, two layers",
        "MSDF, linear: the recipe": "MSDF, small-data",
        "MSDFA, two layers": "MSDFA, two layers",
        "MSDFA, linear": "MSDFA, small-data",
    }
    seeds = [str(len(summary.values(of, summary.BASE, size))) for of, size in columns.values()]
    lines = [
        [what, *(difference(of, method, size) for of, size in columns.values())]
        for what, method in methods.items()
    ]
    return table(["", *columns], [["seeds", *seeds], *lines])


def batches() -> str:
    """What S2SD gains, by the classes in a batch."""
    lines = []
    for size, per_class in ((64, 4), (128, 8), (128, 4), (128, 2), (256, 4)):
        where = {"batch_size": size, "per_class": per_class}
        of, method = rows("icons-400-batches-validation", **where), "MSDF, two layers"
        if not of:  # the row of the settings
            of, method = rows("icons-400-settings-validation", **where), "the recipe"
        base, own = summary.values(of, summary.BASE, 16), summary.values(of, method, 16)
        means = [f"{summary.interval(found.values())[0]:.1f}" for found in (base, own)]
        classes, gain = str(size // per_class), difference(of, method, 16)
        lines.append([f"{size}, {per_class}", classes, str(len(own)), *means, gain])
    head = "batch, samples per class|classes in a batch|seeds|base|S2SD|difference"
    return table(head.split("|"), lines)


TABLES: dict[str, Callable[[], str]] = {
    "gains": gains,
    "validation": validation,
    "batches": batches,
}


def block(name: str) -> str:
    """The table between its comments; without the blank lines it is no table to Markdown."""
    return f"<!-- table: {name} -->\n\n{TABLES[name]()}\n<!-- end -->"


def generated() -> dict[Path, str]:
    """Every file that holds tables, as it should be."""
    files = {
        path: summary.table(rows(path.stem)) + "\n" for path in (DOCS / "results").glob("*.md")
    }
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if BLOCK.search(text):
            files[page] = BLOCK.sub(lambda found: block(found[1]), text)
    return files


if __name__ == "__main__":
    for path, text in generated().items():
        path.write_text(text, encoding="utf-8")
