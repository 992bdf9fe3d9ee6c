"""Settings from files: ``--recipe NAME`` is one that comes along, ``--config FILE`` one's own.

A file holds flags without their dashes, ``batch_size: 112``. It is turned into a command line that
stands before the one that was typed: the parser checks both, and what comes later wins.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

# What config.json of a run holds beside the flags, so that --config can repeat a run.
FACTS = ("command", "ranks", "versions")
RECIPES = Path(__file__).parents[1] / "recipes"


def names() -> list[str]:
    """The recipes there are."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def flags(path: Path) -> list[str]:
    """The command line that a file stands for."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no settings of the form name: value")
    settings = {str(name): value for name, value in content.items() if name not in FACTS}
    return [word for name, value in settings.items() for word in _words(path, name, value)]


def _words(path: Path, name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if flag in ("--config", "--recipe"):
        raise ValueError(f"{path} names {name}: a file of settings cannot bring in another")
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, dict):
        value = [f"{key}={item}" for key, item in value.items()]
    if value is None or value == []:
        return []
    return [flag, *map(str, value if isinstance(value, list) else [value])]


def command_line(argv: list[str]) -> list[str]:
    """The recipe's flags, then those of the file, then the ones given."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--config", type=Path)
    files, _ = first.parse_known_args(argv)
    found = []
    if files.recipe is not None:
        if files.recipe not in names():
            raise ValueError(f"--recipe {files.recipe!r} is none of {', '.join(names())}")
        found += flags(RECIPES / f"{files.recipe}.yaml")
    if files.config is not None:
        found += flags(files.config)
    return found + argv
