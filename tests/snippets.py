"""Run the Python blocks of a Markdown page, in order, in one namespace.

python tests/snippets.py README.md
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run(page: Path) -> int:
    """The number of blocks run. An error names the page and the line in it."""
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": page.name}
    blocks = list(BLOCK.finditer(text))
    for block in blocks:
        line = text[: block.start()].count("\n") + 1
        exec(compile("\n" * line + block[1], str(page), "exec"), namespace)
    return len(blocks)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{name}: {run(Path(name))} blocks ran")
