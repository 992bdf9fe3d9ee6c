"""report.html: the table, the pictures and the configuration of a run in one file."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path

PICTURES = {
    "recall.png": "Recall@1 on test classes over training",
    "dimension.png": "Recall@1 against dimension: the embeddings, the heads that teach, and the "
    "trunk's features cut down by PCA",
    "retrieval.png": "Queries and their nearest neighbours; green is the right class",
    "similarity.png": "Similarities of the same images in each space, ordered by class: what is "
    "distilled. Features after a ReLU have no cosine below 0 and, as teachers, raise the student's",
    "projection.png": "60 of the test classes by t-SNE, ten of them in colour",
    "spectrum.png": "Singular values of each space; ρ is 0 where all directions are used alike",
}
STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #222; --line: #ddd; --soft: #f5f5f5; }
@media (prefers-color-scheme: dark) {
  :root { --back: #16181c; --text: #e4e4e4; --line: #3a3d44; --soft: #23262c; }
}
body { background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif;
  margin: 0 auto; max-width: 60rem; padding: 1rem; }
.scroll { overflow-x: auto; }
h1 { font-size: 1.4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 2rem 0; }
figure img { background: #fff; border-radius: 6px; max-width: 100%; height: auto; }
figcaption { font-size: .9rem; opacity: .8; }
pre { background: var(--soft); border-radius: 6px; overflow-x: auto; padding: .8rem; }
"""


def write(folder: Path) -> Path:
    """From table.md, config.json and the pictures in a run's folder. It needs nothing else."""
    title, _, table = (folder / "table.md").read_text(encoding="utf-8").partition("\n\n")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    parts = [f"<h1>{html.escape(title)}</h1>", f'<div class="scroll">{_table(table)}</div>']
    for name, caption in PICTURES.items():
        if (folder / name).exists():
            data = base64.b64encode((folder / name).read_bytes()).decode()
            parts.append(
                f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
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
