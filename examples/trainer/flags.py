"""What command-line flags are made of: their types, their help, and errors that suggest a fix."""

from __future__ import annotations

import argparse
import ast
import difflib
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from . import ranks


def key_value(text: str) -> tuple[str, Any]:
    """``alpha=2`` -> ("alpha", 2). What is no Python literal stays a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value")
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return key, value


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def count(text: str) -> int:
    """A whole number, 0 or above."""
    return 0 if text.isdecimal() and int(text) == 0 else positive(text)


def decay(text: str) -> float:
    """A number between 0 and 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def rate(text: str) -> float:
    """A finite number, 0 or above."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of 0 or above")
    return value


def switch(default: bool = False) -> dict[str, Any]:
    """A flag with its negation, so that a file's can be taken back."""
    return {"action": argparse.BooleanOptionalAction, "default": default}


class Help(argparse.RawDescriptionHelpFormatter):
    """A line a flag, with its default; a switch is shown as what it changes."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, **{**kwargs, "max_help_position": 34})

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[1 if action.default else 0]
        flag = action.option_strings[-1]
        default = (action.dest if action.choices is None else flag).upper()
        return flag if action.nargs == 0 else f"{flag} {self._format_args(action, default)}"

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs in ("+", "*"):
            return f"{action.metavar} ..."
        return super()._format_args(action, default_metavar)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if isinstance(action, argparse.BooleanOptionalAction):
            return text.removesuffix(" (default: %(default)s)")  # of Python before 3.13
        default = action.default
        if default is False or default in (None, [], argparse.SUPPRESS) or text.endswith("]"):
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        return f"{text} [{shown}]".strip()


class Parser(argparse.ArgumentParser):
    """Rank 0 speaks for all. An unknown flag is refused with the closest known one."""

    def __init__(self, **kwargs: Any) -> None:
        # a recipe's flags must not change what an abbreviation means
        super().__init__(formatter_class=Help, allow_abbrev=False, **kwargs)

    def print_help(self, file: Any = None) -> None:
        if ranks.rank() == 0:
            super().print_help(file)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            unknown = next((word for word in rest if word.startswith("-")), rest[0])
            flag, known = unknown.partition("=")[0], self._option_string_actions
            shown = [name for name, action in known.items() if action.help != argparse.SUPPRESS]
            close = difflib.get_close_matches(flag, shown, n=1, cutoff=0.5)
            hint = f": did you mean {close[0]}?" if close else ""
            self.error(f"unknown argument {unknown}{hint}")
        return found

    def error(self, message: str) -> NoReturn:
        if ranks.rank():  # rank 0 has the same flags: it reports, and torchrun ends the others
            time.sleep(10)
        self.exit(2, f"{self.prog}: error: {message}\nAll flags: {self.prog} --help\n")
