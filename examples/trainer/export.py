"""The deployable model: the network alone, in a file of tensors and numbers.

from .export import load

model = load(Path("model.pt"))
embeddings = model(images)
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint
from .evaluate import apply
from .network import Network

KIND = "model of the example trainer, version 2"
ROUNDING = 1e-2  # of a GPU, which may convolve by another algorithm, in TensorFloat-32


def write(model: Network, path: Path, images: Tensor) -> None:
    """Write the model, load it back, and see that it makes the same embeddings of some images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model.trunk.__dict__.pop("forward", None)  # a compiled one rounds otherwise
    model.to(memory_format=torch.channels_last)  # as it will be loaded
    content = {"kind": KIND, "description": model.description, "state_dict": model.state_dict()}
    checkpoint.write(content, path)
    loaded = load(path).to(next(model.parameters()).device)
    found, want = apply(loaded, images), apply(model, images)
    rounding = ROUNDING if want.is_cuda else 0.0
    if not (found - want).norm() <= rounding * want.norm():
        raise RuntimeError(f"{path}, loaded back, makes other embeddings than the trained model.")


def load(path: Path) -> Network:
    """The model on the CPU, in evaluation mode."""
    content = checkpoint.read(path, KIND)
    model = Network(**content["description"])
    model.load_state_dict(content["state_dict"])
    return model.eval()
