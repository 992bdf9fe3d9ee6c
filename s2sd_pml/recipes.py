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
PAPER: dict[str, Any] = {
    "head_dims": PAPER_HEAD_DIMS,
    "head": ProjectionHead,
    "distill_weight": 50.0,
    "temperature": 1.0,
    "feature_distill_weight": 50.0,
    "feature_distill_delay": 1000,
    "exclude_self": False,
}
HIGH_RATE: dict[str, Any] = {
    "head_dims": (256, 512),
    "head": nn.Linear,
    "distill_weight": 10.0,
    "temperature": 0.1,
    "feature_distill_weight": 10.0,
    "feature_distill_delay": 100,
    "exclude_self": True,
}
RECIPES = {  # by the training that they are for
    "fine-tuning": PAPER,
    "high-rate": HIGH_RATE,
    "from-scratch": {**HIGH_RATE, "distill_weight": 30.0, "feature_distill_weight": 30.0},
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
        """DSD: one auxiliary head, no feature distillation. The cheapest variant.

            1/2 [ L(ψ) + L_1(g_1(φ)) ] + γ KL(g_1(φ) -> ψ)

        Args:
            loss: as for ``S2SDLoss``.
            miner: as for ``S2SDLoss``.
            **kwargs: the other arguments of ``S2SDLoss``. ``head_dims`` holds one dimension, by
                default the largest published, 2048, or the largest of a recipe.

        Raises:
            ArgumentError: for several ``head_dims``, or a ``feature_distill_weight`` that is not 0.

        Examples:
            >>> from pytorch_metric_learning import losses
            >>> from s2sd_pml import S2SDLoss
            >>> S2SDLoss.dsd(losses.NTXentLoss(), feature_dim=32, head_dims=(64,)).head_dims
            (64,)
        """
        return cls(loss, miner, **variant_settings("dsd", kwargs))  # type: ignore[call-arg]

    @classmethod
    def msd(cls, loss: Any, miner: Any = None, **kwargs: Any) -> Self:
        """MSD: several auxiliary heads, no feature distillation.

            1/2 [ L(ψ) + mean_i L_i(g_i(φ)) ] + γ mean_i KL(g_i(φ) -> ψ)

        For features that are no good teacher, such as those of a frozen trunk of another task.

        Args:
            loss: as for ``S2SDLoss``.
            miner: as for ``S2SDLoss``.
            **kwargs: the other arguments of ``S2SDLoss``.

        Raises:
            ArgumentError: for no ``head_dims``, or a ``feature_distill_weight`` that is not 0.

        Examples:
            >>> from pytorch_metric_learning import losses
            >>> from s2sd_pml import S2SDLoss
            >>> S2SDLoss.msd(losses.NTXentLoss(), feature_dim=32).feature_distill_weight
            0.0
        """
        return cls(loss, miner, **variant_settings("msd", kwargs))  # type: ignore[call-arg]

    @classmethod
    def msdf(cls, loss: Any, miner: Any = None, **kwargs: Any) -> Self:
        """MSDF: several auxiliary heads and feature distillation. ``S2SDLoss(...)`` is the same.

            1/2 [ L(ψ) + mean_i L_i(g_i(φ)) ] + γ mean_i KL(g_i(φ) -> ψ) + γ_f KL(φ -> ψ)

        The last term is in force from training step ``feature_distill_delay`` on.

        Args:
            loss: as for ``S2SDLoss``.
            miner: as for ``S2SDLoss``.
            **kwargs: the other arguments of ``S2SDLoss``.

        Raises:
            ArgumentError: for no ``head_dims``, ``feature_distill_weight=0`` or
                ``pooling="avg+max"``.

        Examples:
            >>> from pytorch_metric_learning import losses
            >>> from s2sd_pml import S2SDLoss
            >>> S2SDLoss.msdf(losses.NTXentLoss(), feature_dim=32).feature_distill_delay
            1000
        """
        return cls(loss, miner, **variant_settings("msdf", kwargs))  # type: ignore[call-arg]

    @classmethod
    def msdfa(cls, loss: Any, miner: Any = None, **kwargs: Any) -> Self:
        """MSDFA: MSDF on average plus max pooling of the feature map M.

            φ = avg(M) + max(M), for the heads and as the feature teacher

        It needs the map: name the ``trunk``, an aggregation layer as ``embedder``, or pass
        ``features=`` of shape (B, C, H, W).

        Args:
            loss: as for ``S2SDLoss``.
            miner: as for ``S2SDLoss``.
            **kwargs: the other arguments of ``S2SDLoss``. ``feature_dim`` is the number of channels
                of the map.

        Raises:
            ArgumentError: for another ``pooling``, no ``head_dims``, or
                ``feature_distill_weight=0``.

        Examples:
            >>> import torch
            >>> from pytorch_metric_learning import losses
            >>> from s2sd_pml import S2SDLoss
            >>> trunk = torch.nn.Conv2d(3, 32, 3)
            >>> S2SDLoss.msdfa(losses.NTXentLoss(), trunk=trunk, feature_dim=32).pooling
            'avg+max'
        """
        return cls(loss, miner, **variant_settings("msdfa", kwargs))  # type: ignore[call-arg]

    @staticmethod
    def recipe(name: str) -> dict[str, Any]:
        """Keyword arguments that go together, to pass on as they are or changed.

        They fit ``S2SDLoss`` and every variant. Where you change ``head_dims`` or
        ``feature_distill_weight``, your value counts as given by hand.

        They are settings of this loss. The example trainer's ``--recipe`` is another thing: a file
        of all flags of a run.

        Args:
            name: the training that they are for.

                - "fine-tuning": a pretrained trunk and a small learning rate, 1e-5 to 3e-5. The
                  paper's settings, which are the defaults. In fewer than 10,000 steps set
                  ``feature_distill_delay`` to a tenth of them.
                - "high-rate": a pretrained trunk and a few hundred steps at a higher rate. Weights
                  of 10 at T = 0.1 without the diagonal, so that near neighbours teach; smaller
                  heads, of one layer.
                - "from-scratch": a trunk that is not pretrained. The same with weights of 30.

                What they were chosen by, and what they gain, is measured in the documentation.

        Returns:
            ``head_dims``, ``head``, ``distill_weight``, ``temperature``,
            ``feature_distill_weight``, ``feature_distill_delay`` and ``exclude_self``.

        Raises:
            ArgumentError: for another name.

        Examples:
            >>> from pytorch_metric_learning import losses
            >>> from s2sd_pml import S2SDLoss
            >>> settings = S2SDLoss.recipe("high-rate")
            >>> settings["temperature"], settings["exclude_self"]
            (0.1, True)
            >>> loss_func = S2SDLoss(losses.NTXentLoss(), feature_dim=32, **settings)
        """
        if name not in RECIPES:
            raise ArgumentError(f"recipe={name!r} is none of {', '.join(map(repr, RECIPES))}.")
        settings = dict(RECIPES[name])
        settings["head_dims"] = RecipeDims(settings["head_dims"])
        settings["feature_distill_weight"] = RecipeWeight(settings["feature_distill_weight"])
        return settings
