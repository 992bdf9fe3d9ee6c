"""Bad batches are refused, with the values seen and the mend; nothing is counted."""

import pytest
import torch
from helpers import Model, images
from pytorch_metric_learning import losses
from torch import nn

from s2sd_pml import S2SDLoss
from s2sd_pml.errors import (
    BatchError,
    FeatureShapeError,
    MissingFeaturesError,
    S2SDError,
    UnsupportedLossError,
)

X, Y, PHI = torch.randn(8, 6), torch.arange(8) // 2, torch.randn(8, 12)

BAD = {
    "embeddings_list": ((X.tolist(), Y), {}, BatchError, "list"),
    "embeddings_int": ((X.long(), Y), {}, BatchError, "int64"),
    "embeddings_1d": ((X[0], Y), {}, BatchError, r"\(6,\)"),
    "empty": ((X[:0], Y[:0]), {}, BatchError, "drop_last"),
    "labels_list": ((X, Y.tolist()), {}, BatchError, "torch.as_tensor"),
    "labels_length": ((X, Y[:5]), {}, BatchError, r"\(5,\).*8 embeddings"),
    "labels_2d": ((X, Y[:, None]), {}, BatchError, r"\(8, 1\)"),
    "ref_1d": ((X, Y), {"ref_emb": X[0]}, BatchError, "ref_emb has shape"),
    "labels_for_ssl": ((X, Y), {"ref_emb": X, "ref_features": PHI}, BatchError, "takes no labels"),
    "no_features": ((X, Y), {"features": None}, MissingFeaturesError, "features=.*embedder="),
    "no_ref_features": (
        (X, Y),
        {"ref_emb": X.clone(), "ref_labels": Y},
        MissingFeaturesError,
        "ref_features=",
    ),
    "features_rows": ((X, Y), {"features": PHI[:5]}, FeatureShapeError, r"\(5, 12\).*8 embed"),
    "features_width": ((X, Y), {"features": PHI[:, :7]}, FeatureShapeError, "feature_dim=12"),
    "features_int": ((X, Y), {"features": PHI.long()}, BatchError, "int64"),
    "features_3d": ((X, Y), {"features": PHI[:, :, None]}, FeatureShapeError, r"\(8, 12, 1\)"),
    "features_map": (
        (X, Y),
        {"features": torch.randn(8, 7, 2, 2)},
        FeatureShapeError,
        r"\(8, 7, 2, 2\) has width 7",
    ),
    "features_device": (
        (X, Y),
        {"features": PHI.to("meta")},
        FeatureShapeError,
        r"meta.*features.to\('cpu'\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_batches(case):
    args, kwargs, error, words = BAD[case]
    loss = losses.NTXentLoss()
    if case == "labels_for_ssl":
        loss = losses.SelfSupervisedLoss(loss)
    loss_func = S2SDLoss(loss, feature_dim=12, head_dims=(8,))
    with pytest.raises(error, match=words) as caught:
        loss_func(*args, **{"features": PHI, **kwargs})
    assert isinstance(caught.value, S2SDError)
    assert int(loss_func.step) == 0


def test_pooled_features_for_msdfa_are_refused():
    loss_func = S2SDLoss.msdfa(losses.NTXentLoss(), feature_dim=12, head_dims=(8,))
    with pytest.raises(FeatureShapeError, match="pooled already"):
        loss_func(X, Y, features=PHI)


@pytest.mark.parametrize("wrapper", ["memory", "multiple"])
def test_ref_emb_where_the_loss_takes_none(wrapper):
    inner = losses.ContrastiveLoss()
    loss = (
        losses.CrossBatchMemory(inner, 6) if wrapper == "memory" else losses.MultipleLosses([inner])
    )
    loss_func = S2SDLoss(loss, feature_dim=12, head_dims=(8,))
    with pytest.raises(BatchError, match="takes no ref_emb"):
        loss_func(X, Y, features=PHI, ref_emb=X, ref_labels=Y, ref_features=PHI)


@pytest.mark.parametrize(
    ("value", "words"),
    [({"loss": 1}, "returned a dict"), (torch.ones(8), r"shape \(8,\).*scalar")],
)
def test_a_loss_that_returns_no_scalar(value, words):
    class Odd(nn.Module):
        def forward(self, embeddings, labels):
            return value

    loss_func = S2SDLoss(Odd(), feature_dim=12, head_dims=(8,))
    with pytest.raises(UnsupportedLossError, match=words):
        loss_func(X, Y, features=PHI)


def test_a_loss_that_returns_a_number_still_has_a_graph():
    class Nothing(nn.Module):
        def forward(self, embeddings, labels):
            return 0

    z = X.clone().requires_grad_()
    S2SDLoss(Nothing(), feature_dim=12, head_dims=(8,))(z, Y, features=PHI).backward()
    assert z.grad is not None


def test_a_momentum_encoders_references_need_their_features():
    model = Model()
    loss = losses.SelfSupervisedLoss(losses.NTXentLoss())
    loss_func = S2SDLoss(loss, embedder=model.embedder, head_dims=(8,))
    x = images(8)
    with torch.no_grad():
        references, phi = model(images(8)), model.trunk(images(8)).mean(dim=(2, 3))
    with pytest.raises(MissingFeaturesError, match="ref_emb, of shape .*Pass ref_features=") as e:
        loss_func(model(x), ref_emb=references)
    assert "eval()" not in str(e.value)
    loss_func(model(x), ref_emb=references, ref_features=phi).backward()
    without_heads = S2SDLoss(loss, embedder=model.embedder, head_dims=(), feature_distill_delay=0)
    without_heads(model(x), ref_emb=references).backward()  # no head projects them
    assert without_heads.components["feature_distill"] > 0


def test_a_loss_of_ones_own_with_centres_for_one_size_is_told_the_mend():
    class Centres(nn.Module):
        def __init__(self, size=6):
            super().__init__()
            self.register_buffer("centres", torch.randn(4, size))

        def forward(self, embeddings, labels):
            return ((embeddings - self.centres[labels]) ** 2).mean()

    class Greedy(Centres):
        def forward(self, embeddings, labels):
            return torch.empty(10**15)

    with pytest.raises(RuntimeError, match="memory"):  # that is no matter of the batch
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


def test_a_head_of_the_wrong_width():
    loss_func = S2SDLoss(
        losses.NTXentLoss(), feature_dim=12, head_dims=(8,), head=lambda i, o: nn.Linear(i, o + 1)
    )
    with pytest.raises(FeatureShapeError, match=r"dimension 8.*\(8, 9\)"):
        loss_func(X, Y, features=PHI)
