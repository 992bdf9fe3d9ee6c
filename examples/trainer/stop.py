"""Ctrl-C, and SIGTERM of a cluster, end a run after the step it is in."""

from __future__ import annotations

import signal
from types import FrameType

from . import ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):  # noqa: N818 - it is no error
    """A run was asked to end, and its checkpoint is written."""


def ignore(_worker: int) -> None:
    """What a process that loads images does about Ctrl-C: the one that trains ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Request:
    """Remembers the first signal; the second ends the program where it is."""

    def __init__(self) -> None:
        self.made = False
        self.before = {number: signal.getsignal(number) for number in SIGNALS}

    def __enter__(self) -> Request:
        for number in SIGNALS:
            signal.signal(number, self._made)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _made(self, number: int, frame: FrameType | None) -> None:
        self.made = True
        if ranks.world() == 1:  # torchrun sends several of its own
            self.__exit__()
