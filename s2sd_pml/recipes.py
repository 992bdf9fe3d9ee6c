"""Settings that go together, by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from .errors import ArgumentError
from .heads import ProjectionHead

PAPER_HEAD_DIMS = (512, 1024, 1536, 2048)
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {
        "head_dims": PAPER_HEAD_DIMS,
        "head": ProjectionHead,
        "distill_weight": 50.0,
        "temperature": 1.0,
        "feature_distill_weight": 50.0,
        "feature_distill_delay": 1000,
        "exclude_self": False,
    },
    "small-data": {
        "head_dims": (256, 512),
        "head": nn.Linear,
        "distill_weight": 10.0,
        "temperature": 0.1,
        "feature_distill_weight": 10.0,
        "feature_distill_delay": 100,
        "exclude_self": True,
    },
}


def recipe(name: str) -> dict[str, Any]:
    """The settings of that name, to be changed at will."""
    if name not in RECIPES:
        raise ArgumentError(f"recipe={name!r} is none of {', '.join(map(repr, RECIPES))}.")
    return dict(RECIPES[name])
