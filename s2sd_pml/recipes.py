"""Settings that go together, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from .errors import ArgumentError
from .heads import ProjectionHead
from .validation import check_dims

if TYPE_CHECKING:
    from typing_extensions import Self

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
    settings["head_dims"] = dims = check_dims("head_dims", dims)
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


class Variants:
    """The paper's variants of S2SDLoss by name, and the recipes.

    An argument that contradicts the name is refused, and a recipe fits every variant: DSD takes its
    largest head, DSD and MSD leave its feature distillation out.
    """

    @classmethod
    def dsd(cls, loss: Any, miner: Any = None, **kwargs: Any) -> Self:
        """DSD: one head (of the largest published dimension, 2048), no feature distillation."""
        return cls(loss, miner, **variant_settings("dsd", kwargs))  # type: ignore[call-arg]

    @classmethod
    def msd(cls, loss: Any, miner: Any = None, **kwargs: Any) -> Self:
        """MSD: several heads, no feature distillation."""
        return cls(loss, miner, **variant_settings("msd", kwargs))  # type: ignore[call-arg]

    @classmethod
    def msdf(cls, loss: Any, miner: Any = None, **kwargs: Any) -> Self:
        """MSDF: several heads and, from step ``feature_distill_delay`` on, feature distillation."""
        return cls(loss, miner, **variant_settings("msdf", kwargs))  # type: ignore[call-arg]

    @classmethod
    def msdfa(cls, loss: Any, miner: Any = None, **kwargs: Any) -> Self:
        """MSDFA: MSDF on the sum of average- and max-pooled feature maps."""
        return cls(loss, miner, **variant_settings("msdfa", kwargs))  # type: ignore[call-arg]

    @staticmethod
    def recipe(name: str) -> dict[str, Any]:
        """Keyword arguments that go together, to pass on as they are or changed.

        They fit ``S2SDLoss`` and every variant. Where you change ``head_dims`` or
        ``feature_distill_weight``, your value counts as given by hand.

        They are settings of this loss. The example trainer's ``--recipe`` is another thing: a file
        of all flags of a run.

        Args:
            name: "paper", the defaults: weights of 50 at T = 1, for some 8,000 steps at a learning
                rate of 1e-5. Or "small-data", for some hundred steps at a higher one: weights of 10
                at T = 0.1 without the diagonal, so that near neighbours teach, and smaller heads,
                of one layer. What it was chosen by, and what it gains, is measured in the
                documentation.

        Returns:
            ``head_dims``, ``head``, ``distill_weight``, ``temperature``,
            ``feature_distill_weight``, ``feature_distill_delay`` and ``exclude_self``.

        Raises:
            ArgumentError: for another name.

        Examples:
            >>> from pytorch_metric_learning import losses
            >>> from s2sd_pml import S2SDLoss
            >>> settings = S2SDLoss.recipe("small-data")
            >>> settings["temperature"], settings["exclude_self"]
            (0.1, True)
            >>> loss_func = S2SDLoss(losses.NTXentLoss(), feature_dim=32, **settings)
        """
        return recipe(name)
