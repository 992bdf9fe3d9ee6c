"""Errors of losses and miners: PML's refusals name the batch, custom code's stay as they are."""

import sys

import pytest
import torch
from helpers import Custom
from pytorch_metric_learning import distances, losses, miners
from torch import nn

from s2sd_pml import S2SDLoss
from s2sd_pml.errors import BatchError

X, Y, PHI = torch.randn(8, 6), torch.arange(8) // 2, torch.randn(8, 12)


class Breaks:
    """Raises an error of its own, as custom code does."""

    def __init__(self, error):
        self.error = error

    def __call__(self, *args, **kwargs):
        raise self.error


class BrokenDistance(distances.LpDistance):
    def compute_mat(self, *args):
        raise KeyError("mine")


class BrokenLoss(losses.ContrastiveLoss):
    def compute_loss(self, *args):
        return self.margin


class BrokenMiner(miners.BaseMiner):
    def mine(self, *args):
        raise ValueError("mine")

    def output_assertion(self, output):
        pass


CUSTOM_ERRORS = {
    "attribute": ((Custom(lambda z, y: z.margin),), AttributeError, "margin"),
    "value": ((Custom(Breaks(ValueError("mine"))),), ValueError, "^mine"),
    "type": ((Custom(Breaks(TypeError("mine"))),), TypeError, "^mine"),
    "runtime": ((Custom(Breaks(RuntimeError("mine"))),), RuntimeError, "^mine"),
    "torch": ((Custom(lambda z, y: z @ z),), RuntimeError, "cannot be multiplied"),
    "subclass": ((BrokenLoss(),), AttributeError, "margin"),
    "inside": ((losses.MultipleLosses([BrokenLoss()]),), AttributeError, "margin"),
    "distance": ((losses.ContrastiveLoss(distance=BrokenDistance()),), KeyError, "mine"),
    "miner": ((losses.ContrastiveLoss(), BrokenMiner()), ValueError, "^mine"),
}


@pytest.mark.parametrize("case", CUSTOM_ERRORS)
def test_errors_of_custom_code_stay_as_they_are_with_a_note(case):
    parts, kind, words = CUSTOM_ERRORS[case]
    loss_func = S2SDLoss(*parts, feature_dim=12, head_dims=(8,))
    with pytest.raises(kind, match=words) as caught:
        loss_func(X, Y, features=PHI)
    assert type(caught.value) is kind
    if sys.version_info >= (3, 11):
        (note,) = caught.value.__notes__
        assert note.startswith(f"Raised in {type(parts[0]).__name__}")
        assert "embeddings (8, 6), labels (8,) torch.int64" in note


def test_what_pml_refuses_in_a_subclass_is_a_batch_error():
    class Mine(losses.ArcFaceLoss):
        pass

    loss_func = S2SDLoss(Mine(2, 6), feature_dim=12, head_dims=(8,))
    with pytest.raises(BatchError, match="Mine refused embeddings"):
        loss_func(X, Y, features=PHI)


def test_a_custom_loss_with_centres_of_one_size_is_refused_with_the_fix():
    class Centres(nn.Module):
        def __init__(self, size=6):
            super().__init__()
            self.register_buffer("centres", torch.randn(4, size))

        def forward(self, embeddings, labels):
            return ((embeddings - self.centres[labels]) ** 2).mean()

    class Greedy(Centres):
        def forward(self, embeddings, labels):
            return torch.empty(10**15)

    with pytest.raises(RuntimeError, match="memory"):  # not an error of the batch
        S2SDLoss(Greedy(), feature_dim=12, head_dims=(8,))(X, Y, features=PHI)
    with pytest.raises(BatchError, match=r"buffers \(centres\).*factory dim -> loss"):
        S2SDLoss(Centres(), feature_dim=12, head_dims=(8,))(X, Y, features=PHI)
    loss_func = S2SDLoss(lambda dim: Centres(dim), feature_dim=12, head_dims=(8,), embedding_size=6)
    assert loss_func(X, Y, features=PHI).isfinite()


@pytest.mark.parametrize(
    "loss",
    [
        losses.ProxyAnchorLoss(2, 6),
        losses.ArcFaceLoss(2, 6),
        losses.MarginLoss(num_classes=2, learn_beta=True),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_labels_beyond_the_classes_are_refused_with_what_was_passed_only(loss):
    loss_func = S2SDLoss(loss, feature_dim=12, head_dims=(8,))
    with pytest.raises(BatchError, match=type(loss).__name__) as caught:
        loss_func(X, Y, features=PHI)
    assert "indices_tuple" not in str(caught.value)
