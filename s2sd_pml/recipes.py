"""Settings that go together, by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from .errors import ArgumentError
from .heads import ProjectionHead
from .validation import check_head_dims

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
VARIANTS = {
    "dsd": "one head, no feature distillation",
    "msd": "heads, no feature distillation",
    "msdf": "heads and feature distillation",
    "msdfa": "heads and feature distillation, average + max pooling",
}


class RecipeDims(tuple[int, ...]):
    """``head_dims`` of a recipe: a variant may take a part of them."""


class RecipeWeight(float):
    """``feature_distill_weight`` of a recipe: a variant without that term sets it to 0."""


def recipe(name: str) -> dict[str, Any]:
    """A new dictionary of the settings of that name."""
    if name not in RECIPES:
        raise ArgumentError(f"recipe={name!r} is none of {', '.join(map(repr, RECIPES))}.")
    settings = dict(RECIPES[name])
    settings["head_dims"] = RecipeDims(settings["head_dims"])
    settings["feature_distill_weight"] = RecipeWeight(settings["feature_distill_weight"])
    return settings


def plain(weight: Any) -> Any:
    """A weight of a recipe as a float; anything else as it is."""
    return float(weight) if isinstance(weight, RecipeWeight) else weight


def variant_settings(variant: str, given: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of S2SDLoss for a variant of the paper.

    A value of a recipe is a default: where it does not fit the variant, it is replaced. Any other
    value was given by hand, and is refused where it contradicts the variant.

    | | ``head_dims`` | ``feature_distill_weight`` | ``pooling`` |
    | --- | --- | --- | --- |
    | dsd | one; default 2048, or the recipe's largest | 0 | as given |
    | msd | one or more | 0 | as given |
    | msdf | one or more | a number above 0, or a schedule | any but "avg+max" |
    | msdfa | one or more | a number above 0, or a schedule | "avg+max" |

    Raises:
        ArgumentError: for an argument that contradicts the variant.
    """
    settings, dims = dict(given), given.get("head_dims", RecipeDims(PAPER_HEAD_DIMS))
    if variant == "dsd" and isinstance(dims, RecipeDims):
        dims = (max(dims),)
    settings["head_dims"] = dims = check_head_dims(dims)
    if not dims:
        raise _contradiction(variant, "head_dims", dims, "S2SDLoss(...)")
    if variant == "dsd" and len(dims) > 1:
        raise _contradiction(variant, "head_dims", dims, "S2SDLoss.msd(...)")

    weight = given.get("feature_distill_weight", RecipeWeight(1.0))
    if variant in ("dsd", "msd"):
        if not isinstance(weight, RecipeWeight) and (callable(weight) or weight != 0):
            raise _contradiction(variant, "feature_distill_weight", weight, "S2SDLoss.msdf(...)")
        settings["feature_distill_weight"] = 0.0
    elif not callable(weight) and weight == 0:
        raise _contradiction(variant, "feature_distill_weight", weight, "S2SDLoss.msd(...)")

    pooling = given.get("pooling", "avg+max" if variant == "msdfa" else "avg")
    if variant == "msdfa" and pooling != "avg+max":
        raise _contradiction(variant, "pooling", pooling, "S2SDLoss.msdf(...)")
    if variant == "msdf" and pooling == "avg+max":
        raise _contradiction(variant, "pooling", pooling, "S2SDLoss.msdfa(...)")
    return {**settings, "pooling": pooling}


def _contradiction(variant: str, name: str, value: Any, instead: str) -> ArgumentError:
    return ArgumentError(
        f"{name}={value!r} contradicts {variant.upper()}: {VARIANTS[variant]}. Leave it out, or "
        f"use {instead}."
    )
