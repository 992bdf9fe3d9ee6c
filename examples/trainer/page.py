"""report.html: the table, the pictures and the configuration of a run in one file."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path

PICTURES = {
    "recall.png": "Recall@1 after every epoch; of several seeds the mean, and each as a thin line",
    "losses.png": "Losses of both runs, and the terms of S2SD before they are weighted; means of "
    "each epoch",
    "dimension.png": "Recall@1 against dimension: the embeddings, the auxiliary heads, which are "
    "the teachers, and the trunk's features reduced by PCA",
    "retrieval.png": "Queries and their nearest neighbours: ✓ is the class of the query, ✗ another",
    "similarity.png": "Similarities of the same images in each space, ordered by class: what is "
    "distilled. Features after a ReLU have no cosine below 0 and, as teachers, raise the student's",
    "projection.png": "60 of the test classes by t-SNE, ten of them with a colour and a marker",
    "spectrum.png": "Singular values of each space; ρ is 0 where all directions are used alike",
}
WIDE = ("retrieval.png",)  # a phone scrolls it
ONE_SEED = (
    "<strong>One seed.</strong> Between seeds, single runs differ by as much as many settings do. "
    "Before you conclude, train several: <code>--seeds 0 1 2 3 4</code>."
)
SEVERAL = (
    "Means of {n} seeds. ± is the 95% t interval of the difference over training seeds, paired by "
    "seed. It does not cover the choice of classes or data set. Rows share the same runs and move "
    "together. Pictures of images and spaces are those of seed {first}."
)
STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #222; --line: #ddd; --soft: #f5f5f5; }
@media (prefers-color-scheme: dark) {
  :root { --back: #16181c; --text: #e4e4e4; --line: #3a3d44; --soft: #23262c; }
}
body { background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif;
  margin: 0 auto; max-width: 60rem; padding: 1rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
.note { border-left: .3rem solid #d98a00; background: var(--soft); padding: .5rem .8rem; }
h1 { font-size: 1.3rem; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--back); }
figure { margin: 2rem 0; max-width: 42rem; }
figure img { background: #fff; border-radius: 6px; width: 100%; height: auto; }
figure.wide { max-width: none; }
figure.wide img { min-width: 40rem; }
figcaption { font-size: .95rem; }
@media (max-width: 30rem) { table { font-size: .85rem; } th, td { padding: .3rem .35rem; } }
pre { background: var(--soft); border-radius: 6px; overflow-x: auto; padding: .8rem; }
"""


def write(folder: Path) -> Path:
    """From table.md, config.json and the pictures in a run's folder. It needs nothing else."""
    title, _, table = (folder / "table.md").read_text(encoding="utf-8").partition("\n\n")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    seeds = config.get("seeds") or [config["seed"]]
    note = ONE_SEED if len(seeds) == 1 else SEVERAL.format(n=len(seeds), first=seeds[0])
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<div class="scroll" tabindex="0">{_table(table)}</div>',
        f'<p class="note">{note}</p>',
    ]
    for name, caption in PICTURES.items():
        if (folder / name).exists():
            data = base64.b64encode((folder / name).read_bytes()).decode()
            kind = ' class="wide"' if name in WIDE else ""
            parts.append(
                f'<figure{kind}><div class="scroll"><img alt="{html.escape(caption)}" '
                f'src="data:image/png;base64,{data}"></div>'
                f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            )
    text = html.escape(json.dumps(config, indent=2))
    parts.append(
        f"<details><summary>Configuration and versions</summary><pre>{text}</pre></details>"
    )
    path = folder / "report.html"
    path.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n",
        encoding="utf-8",
    )
    return path


def _table(markdown: str) -> str:
    lines = [line.strip() for line in markdown.splitlines() if line.startswith("|")]
    head, _, *body = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in body]
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    return f"<table><tr>{top}</tr>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"
