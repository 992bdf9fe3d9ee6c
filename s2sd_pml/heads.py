"""The auxiliary projection head and the pooling of feature maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .errors import BatchError

Pooling = str | Callable[[Tensor], Tensor]
POOLINGS = ("avg", "avg+max")


class ProjectionHead(nn.Module):
    """The paper's auxiliary head g(φ) = W₂ relu(W₁ φ + b₁) + b₂.

    Args:
        in_dim: feature dimension F.
        out_dim: dimension d of the auxiliary space; also the width of the hidden layer.

    Shape:
        features (B, F) -> embeddings (B, d), not normalised.

    Source:
        Roth et al., ICML 2021, section 3.2 (arXiv 2009.08348).

    Examples:
        >>> import torch
        >>> ProjectionHead(16, 64)(torch.randn(4, 16)).shape
        torch.Size([4, 64])
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(in_dim, out_dim)
        self.output = nn.Linear(out_dim, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        embeddings: Tensor = self.output(torch.relu(self.hidden(features)))
        return embeddings


class Unowned:
    """Calls a module without owning it: a pooling that is part of the model is trained there."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, features: Tensor) -> Tensor:
        pooled: Tensor = self.module(features)
        return pooled

    def __deepcopy__(self, memo: dict[int, object]) -> Unowned:
        module = memo.get(id(self.module), self.module)
        return Unowned(module)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return repr(self.module)


def pool(features: Tensor, pooling: Pooling) -> Tensor:
    """Pool a feature map (B, C, H, W) to (B, C); pooled features (B, F) pass unchanged under "avg".

    Args:
        features: (B, F) or (B, C, H, W).
        pooling: "avg" is global average pooling, "avg+max" adds global max pooling to it (a sum, as
            in MSDFA). A callable takes the features and returns (B, F).

    Returns:
        The pooled features, (B, C) or (B, F).

    Raises:
        BatchError: for another shape, and for "avg+max" of features that are pooled already.

    Examples:
        >>> import torch
        >>> pool(torch.ones(2, 3, 4, 4), "avg+max")
        tensor([[2., 2., 2.],
                [2., 2., 2.]])
    """
    if callable(pooling):
        pooled = pooling(features)
        if not isinstance(pooled, Tensor) or pooled.ndim != 2:
            seen = tuple(pooled.shape) if isinstance(pooled, Tensor) else type(pooled).__name__
            raise BatchError(
                f"pooling={pooling!r} turned features of shape {tuple(features.shape)} into "
                f"{seen}. It must return a tensor of shape (B, F)."
            )
        return pooled
    if features.ndim == 4:
        average = features.mean(dim=(2, 3))
        return average if pooling == "avg" else average + features.amax(dim=(2, 3))
    if features.ndim == 2 and pooling == "avg":
        return features
    if features.ndim == 2:
        raise BatchError(
            f"pooling='avg+max' needs a feature map (B, C, H, W) but the features have shape "
            f"{tuple(features.shape)}: they are pooled already. Pass trunk=<the module that "
            "outputs the map> or features=<the map>, or use pooling='avg'."
        )
    raise BatchError(
        f"Features have shape {tuple(features.shape)}. Pass pooled features (B, F) or a map "
        "(B, C, H, W), or give pooling= a callable that returns (B, F)."
    )


def input_width(module: nn.Module) -> int | None:
    """The width of the features that a module takes, read off its first layer with a width.

    Layers come in the order of registration; those without parameters are skipped. Linear and
    batch and layer normalisation have a width, LoRA layers that of their base layer. A lazy layer
    has none yet: None, as for a module that starts with another layer.
    """
    for layer in _layers(module):
        width = getattr(layer, "in_features", None)
        if isinstance(layer, (nn.BatchNorm1d, nn.SyncBatchNorm)):
            width = layer.num_features
        elif shape := getattr(layer, "normalized_shape", None):
            width = shape[0] if len(shape) == 1 else None
        if isinstance(width, int):
            return width or None
        if next(layer.parameters(), None) is not None:
            return None
    return None


def output_width(module: nn.Module) -> int | None:
    """The width of a module's output: that of its last linear layer, in order of registration."""
    widths = [getattr(layer, "out_features", None) for layer in _layers(module)]
    return next((width for width in reversed(widths) if isinstance(width, int)), None)


def is_linear(module: nn.Module) -> bool:
    """Whether the module is one nn.Linear, perhaps wrapped: compiled, in parallel, with LoRA."""
    layers = list(_layers(module))
    return len(layers) == 1 and isinstance(layers[0], nn.Linear)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The modules without children in order of registration; a LoRA layer is its base layer."""
    base = getattr(module, "base_layer", None)
    children = [base] if isinstance(base, nn.Module) else list(module.children())
    if not children or isinstance(module, nn.Linear):
        yield module
    else:
        for child in children:
            yield from _layers(child)
