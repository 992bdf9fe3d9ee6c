"""Write the tables of README and docs anew from the result files: python docs/tables.py

`docs/results/NAME.md` is the table of `NAME.csv`. In the pages the text between
`<!-- table: NAME -->` and `<!-- end -->` is what the function of that name returns here.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import ttest_1samp

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "examples"))

from study import summary  # noqa: E402

PERFORMANCE = DOCS / "performance.md"  # draw_performance.py writes its tables
PAGES = [DOCS.parent / "README.md", *sorted({*DOCS.glob("*.md")} - {PERFORMANCE})]
BLOCK = re.compile(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
METRIC, LEVEL = summary.METRIC, 0.05

Rows = list[summary.Row]


class Difference(NamedTuple):
    """Method minus a baseline at one embedding size, in points, by seed."""

    points: list[float]

    @property
    def text(self) -> str:
        """Mean and half the 95% interval; one seed has none."""
        if not self.points:
            return ""
        mean, half = summary.interval(self.points)
        return f"{mean:+.1f}" + (f" ± {half:.1f}" if len(self.points) > 1 else "")

    @property
    def p(self) -> float:
        """Of the paired t test."""
        return float(ttest_1samp(self.points, 0).pvalue) if len(self.points) > 1 else 1.0


def rows(name: str, **where: Any) -> Rows:
    """The rows of a result file, those with the values in ``where``."""
    with open(DOCS / "results" / f"{name}.csv", newline="") as file:
        found = list(csv.DictReader(file))
    return [
        {**row, "size": int(row["size"]),
         "seed": int(row["seed"]), METRIC: float(row[METRIC])}
        for row in found
        if all(row[column] == str(value) for column, value in where.items())
    ]  # fmt: skip


def difference(found: Rows, method: str, size: int, base: str = summary.BASE) -> Difference:
    """Method minus base at the same seeds."""
    own, other = (summary.values(found, name, size) for name in (method, base))
    return Difference([own[seed] - other[seed] for seed in own if seed in other])


def significant(differences: Iterable[Difference]) -> set[int]:
    """The places of those that survive Holm's correction for the number of cells in a table."""
    p = {i: d.p for i, d in enumerate(differences) if len(d.points) > 1}
    kept: set[int] = set()
    for rank, place in enumerate(sorted(p, key=p.__getitem__)):
        if p[place] * (len(p) - rank) > LEVEL:
            break
        kept.add(place)
    return kept


def bold(lines: list[list[str | Difference]]) -> list[list[str]]:
    """The cells as text, in bold those differences that survive the correction."""
    cells = [cell for line in lines for cell in line if isinstance(cell, Difference)]
    kept = {id(cells[i]) for i in significant(cells)}

    def text(cell: str | Difference) -> str:
        if isinstance(cell, str):
            return cell
        return f"**{cell.text}**" if id(cell) in kept else cell.text

    return [[text(cell) for cell in line] for line in lines]


def mean(found: Rows, method: str, size: int) -> str:
    """The mean over seeds, in %."""
    values = summary.values(found, method, size)
    return f"{summary.interval(values.values())[0]:.1f}" if values else ""


def table(head: list[str], lines: list[list[str]], left: int = 1) -> str:
    """Numbers to the right, names to the left."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, rule, *lines])


SMALL, MSDFA = "MSDF, high-rate", "MSDFA, high-rate"  # the recipe
REFITTED = ", refitted embedder"
RESULTS = [  # data and training, result file, S2SD's method, the baseline, sizes
    ("CUB-200-2011, pretrained, the paper's settings", "cub", "MSDF", "base", (32, 128)),
    ("CUB-200-2011, both with a refitted embedder", "cub", "MSDF" + REFITTED, "base" + REFITTED,
     (128,)),
    ("emoji, pretrained, high rate", "emoji", SMALL, "base", (16, 32, 64, 128)),
    ("emoji, both with a refitted embedder", "emoji-gpu", SMALL + REFITTED, "base" + REFITTED,
     (16, 32)),
    ("icons-400, from scratch", "icons-400-from-scratch", "MSDF", "base", (16,)),
    ("242 other concepts, from scratch", "icons-242", "MSDF", "base", (16,)),
    ("685 other concepts, from scratch", "icons-685", "MSDF", "base", (16,)),
]  # fmt: skip


def results() -> str:
    """What S2SD gains on every data set: base, S2SD, difference, seeds."""
    lines: list[list[str | Difference]] = []
    for what, file, method, base, sizes in RESULTS:
        found = rows(file)
        for size in sizes:
            gain = difference(found, method, size, base)
            seeds = str(len(gain.points))
            means = [mean(found, name, size) for name in (base, method)]
            lines.append([what, str(size), *means, gain, seeds])
    head = "data and training|dimensions|base|S2SD|difference|seeds"
    return table(head.split("|"), bold(lines))


def alternatives() -> str:
    """What other uses of the same time gain, next to S2SD with the settings of the training."""
    columns = [("CUB, 64 pixels", "cub-64-pixels", 128, "MSDF")]
    columns += [(file, file, size, SMALL) for file in ("emoji", "icons-400") for size in (16, 32)]
    methods = {
        "S2SD, on CUB the defaults, else `high-rate`": "",  # that of the column
        "the same as MSDFA": MSDFA,
        "auxiliary heads without distillation": "heads, no KL",
        "the base loss for twice as many steps": "base, twice the steps",
        "two-stage distillation from 512 dimensions": "two-stage distillation",
        "PCA of a base model with 512 dimensions": "base 512 + PCA",
        "Matryoshka losses, one training for all sizes": "Matryoshka",
    }
    lines: list[list[str | Difference]] = []
    for what, method in methods.items():
        cells = [difference(rows(file), method or s2sd, size) for _, file, size, s2sd in columns]
        lines.append([what, *(cell if cell.points else "" for cell in cells)])
    return table(["", *(f"{name}, {size}" for name, _, size, _ in columns)], bold(lines))


def gains() -> str:
    """What S2SD gains, by embedding size."""
    sizes = (16, 32, 64, 128)
    kinds = [
        ("CUB-200-2011, pretrained, the paper's settings", "cub", "MSDF", "base"),
        ("emoji, pretrained, high rate", "emoji", SMALL, "base"),
        ("icons-400, from scratch", "icons-400-from-scratch", "MSDF", "base"),
    ]
    lines: list[list[str | Difference]] = []
    for what, file, method, base in kinds:
        cells = [difference(rows(file), method, size, base) for size in sizes]
        seeds = max(len(cell.points) for cell in cells)
        shown = [cell if len(cell.points) > 1 or seeds == 1 else "" for cell in cells]
        lines.append([what, *shown, str(seeds)])
    return table(["Recall@1, S2SD minus base", *map(str, sizes), "seeds"], bold(lines))


def matryoshka() -> str:
    """One training for all sizes, with S2SD and without, against a model for each size."""
    kinds = [
        ("CUB-200-2011, 64 pixels", "cub-64-pixels", "MSDF, Matryoshka"),
        ("emoji", "emoji", f"{SMALL}, Matryoshka"),
    ]
    sizes = (16, 32, 64, 128)
    lines: list[list[str | Difference]] = []

    def seeds(counts: Iterable[int]) -> str:
        return " to ".join(map(str, sorted({min(counts), max(counts)})))

    for what, file, own in kinds:
        found = rows(file)
        for name, method in (
            ("base loss, a model for each size", summary.BASE),
            ("PCA of 512 dimensions", "base 512 + PCA"),
            ("Matryoshka losses", "Matryoshka"),
            ("S2SD, `matryoshka_dims`", own),
        ):
            counts = [len(summary.values(found, method, size)) for size in sizes]
            means = (mean(found, method, size) for size in sizes)
            lines.append([what, name, *means, seeds(counts)])
            what = ""  # once a data set
        for name, method in (
            ("base loss", summary.BASE),
            ("PCA", "base 512 + PCA"),
            ("Matryoshka", "Matryoshka"),
        ):
            cells = [difference(found, own, size, method) for size in sizes]
            counts = [len(cell.points) for cell in cells]
            lines.append([what, f"S2SD minus {name}", *cells, seeds(counts)])
    return table(["data", "Recall@1", *map(str, sizes), "seeds"], bold(lines), left=2)


def teachers() -> str:
    """What an outside teacher gains over the same training without it."""
    small, own = "EfficientNet-lite2, frozen", "own model of 512 dimensions"
    kinds = [
        ("CUB-200-2011, 64 pixels", 128, small, "no", "cub-64-pixels", "lite2", "base"),
        ("CUB-200-2011, 64 pixels", 128, small, "yes", "cub-64-pixels", "MSDF and lite2", "MSDF"),
        ("emoji", 32, small, "no", "emoji", "lite2, high-rate", "base"),
        ("emoji", 32, small, "yes", "emoji", "MSDF and lite2, high-rate", SMALL),
        ("emoji", 32, own, "no", "emoji", "two-stage distillation", "base"),
        ("icons-400", 16, own, "no", "icons-400", "two-stage distillation", "base"),
    ]
    lines: list[list[str | Difference]] = []
    for what, size, teacher, heads, file, method, base in kinds:
        found = rows(file)
        gain = difference(found, method, size, base)
        seeds = set(summary.values(found, method, size))
        paired = [row for row in found if row["seed"] in seeds]
        means = [mean(paired, name, size) for name in (base, method)]
        lines.append([f"{what}, {size}", teacher, heads, *means, gain, str(len(gain.points))])
    head = "data, dimensions|teacher|heads as well|without it|with it|difference|seeds"
    return table(head.split("|"), bold(lines), left=3)


def diagnosis(name: str) -> list[dict[str, float]]:
    """What diagnose.py wrote after every epoch of a run."""
    with open(DOCS / "results" / f"diagnosis-{name}.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def diagnoses() -> str:
    """Where the weights are too strong: what diagnose.py saw in the first 160 steps."""
    paper, ten = "γ = 50, T = 1", "γ = 10, T = 1"
    kinds = [
        ("CUB-200-2011", 128, "3e-5", paper, "cub-3e-5"),
        ("CUB-200-2011", 128, "3e-4", paper, "cub-3e-4"),
        ("emoji", 32, "4e-4", paper, "emoji-4e-4"),
        ("emoji", 32, "4e-4", "`high-rate`", "emoji-high-rate"),
        ("icons-400, from scratch", 16, "3e-3", paper, "50"),
        ("icons-400, from scratch", 16, "3e-3", ten, "10"),
        ("icons-400, from scratch", 16, "3e-3", "`from-scratch`", "from-scratch"),
    ]
    lines = []
    for data, size, rate, settings, file in kinds:
        looks = [row for row in diagnosis(file) if row["step"] <= 160]
        ratios = [row["distill on embedder"] / row["base on embedder"] for row in looks]
        last = looks[-1]
        heads = [k.removeprefix("agreement with ") for k in last if "with head" in k]
        best = max(heads, key=lambda head: last[f"Recall@1 of {head}"])
        recalls = (last[f"Recall@1 of {space}"] for space in ("student", "features", best))
        share = f"{min(ratios):.1f} to {max(ratios):.1f}"
        shown = (f"{100 * r:.1f}" for r in recalls)
        lines.append([data, str(size), rate, settings, share, *shown, f"{last['step']:.0f}"])
    head = (
        "data|dimensions|learning rate|settings|distill over base|student|features|best head|"
        "after steps"
    )
    return table(head.split("|"), lines, left=4)


def milliseconds(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def measured(name: str) -> list[dict[str, Any]]:
    """The rows of a benchmark."""
    text = (DOCS / "performance" / f"{name}.json").read_text(encoding="utf-8")
    found: list[dict[str, Any]] = json.loads(text)["rows"]
    return found


def costs() -> str:
    """What S2SD costs in time and memory, from the files of docs/performance."""
    lines = []
    for name, key, what in (
        ("full-step", "pixels", "training step, EfficientNet-lite0, {} pixels"),
        ("loss-step", "batch", "the loss alone, 2048 features, batch {}"),
    ):
        for row in measured(name):
            times = [milliseconds(row[f"{loss} ms"]) for loss in ("base loss", "S2SDLoss")]
            if row.get("mode", "eager") == "eager":
                lines.append([what.format(row[key]), *times, f"{row['S2SDLoss / base']:.2f}"])
    lines.append(["parameters of the heads, 2048 features, in training", "0", "18.4 million", ""])
    lines.append(["the deployed model", "unchanged", "unchanged", "1"])
    return table(["", "base loss", "S2SD", "ratio"], lines)


def prefixes() -> str:
    """What three prefixes add to the operations of a loss step."""
    ratio = "with / without prefixes"
    lines = [
        [row["loss"], str(row["S2SDLoss"]), str(row["with prefixes"]), f"{row[ratio]:.2f}"]
        for row in measured("launches")
    ]
    return table(["loss", "without", "with 16, 32, 64 of 128", "ratio"], lines)


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
        "MSDF, linear: the recipe": SMALL,
        "MSDFA, two layers": "MSDFA, two layers",
        "MSDFA, linear": MSDFA,
    }
    seeds = [str(len(summary.values(of, summary.BASE, size))) for of, size in columns.values()]
    lines = [
        [what, *(difference(of, method, size).text for of, size in columns.values())]
        for what, method in methods.items()
    ]
    return table(["", *columns], [["seeds", *seeds], *lines])


def rates() -> str:
    """Defaults and recipe by learning rate, on held-out training classes of CUB."""
    lines = []
    for rate in (3e-5, 1e-4, 3e-4):
        found = rows("cub-64-pixels-validation", lr=rate)
        cells = [mean(found, summary.BASE, 128)]
        for method in ("MSDF", SMALL):
            gain = difference(found, method, 128)
            cells.append(f"{mean(found, method, 128)} ({gain.text})")
        seeds = len(summary.values(found, summary.BASE, 128))
        lines.append([f"{rate:.0e}".replace("e-0", "e-"), *cells, str(seeds)])
    return table(["learning rate", "base", "the defaults", "`high-rate`", "seeds"], lines)


def batches() -> str:
    """What S2SD gains, by the classes in a batch."""
    lines = []
    for size, per_class in ((64, 4), (128, 8), (128, 4), (128, 2), (256, 4)):
        where = {"batch_size": size, "per_class": per_class}
        of, method = rows("icons-400-batches-validation", **where), "MSDF, two layers"
        if not of:  # the row of the settings
            of, method = rows("icons-400-settings-validation", **where), "the recipe"
        gain = difference(of, method, 16)
        means = [mean(of, name, 16) for name in (summary.BASE, method)]
        classes, seeds = str(size // per_class), str(len(gain.points))
        lines.append([f"{size}, {per_class}", classes, seeds, *means, gain.text])
    head = "batch, samples per class|classes in a batch|seeds|base|S2SD|difference"
    return table(head.split("|"), lines)


TABLES: dict[str, Callable[[], str]] = {
    "alternatives": alternatives,
    "batches": batches,
    "costs": costs,
    "diagnoses": diagnoses,
    "gains": gains,
    "matryoshka": matryoshka,
    "prefixes": prefixes,
    "rates": rates,
    "results": results,
    "teachers": teachers,
    "validation": validation,
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
