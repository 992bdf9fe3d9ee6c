"""Every loss and miner that pytorch-metric-learning exports trains inside S2SDLoss.

In every precision, with every miner and with ref_emb it is ``tests/matrix`` that trains them. The
lists come from the installed PML, so that a class that a later release adds is noticed here.
What fails is shown to fail without S2SDLoss too; such a test fails when PML fixes it.
"""

import pytest
import torch
from pml import (
    CLASSES,
    LOSSES,
    NO_INDICES_TUPLE,
    NO_REF_EMB,
    SIZE,
    make_loss,
    make_miner,
    miner_names,
)
from pml_training import BATCH, DIMS, FEATURES, hardest, labels, refused, stats, train
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.utils import common_functions as c_f
from torch import nn

from s2sd_pml import S2SDLoss
from s2sd_pml.errors import ArgumentError, S2SDError


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains(name):
    train(make_loss(name))


@pytest.mark.parametrize("name", ["MultiSimilarityLoss", "ProxyAnchorLoss", "TripletMarginLoss"])
@pytest.mark.parametrize("how", ["pairs from outside", "both"])
def test_a_loss_that_takes_pairs_trains_with_those_from_outside(name, how):
    miner = make_miner("MultiSimilarityMiner") if how == "both" else None
    train(make_loss(name), miner, given=True)


@pytest.mark.parametrize("name", ["MultiSimilarityLoss", "TripletMarginLoss"])
@pytest.mark.parametrize("features", ["explicit", "captured"])
def test_a_loss_that_compares_with_ref_emb_trains(name, features):
    train(make_loss(name), make_miner("MultiSimilarityMiner"), ref=features)


@pytest.mark.parametrize("name", ["ArcFaceLoss", "MultiSimilarityLoss", "TripletMarginLoss"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_loss_trains_in_other_precisions(name, dtype):
    if dtype == torch.float64:
        train(make_loss(name), dtype=dtype)
    else:
        train(make_loss(name), autocast=True)


@pytest.mark.parametrize("name", ["ArcFaceLoss", "MultiSimilarityLoss", "TripletMarginLoss"])
def test_what_pml_records_is_recorded(name, monkeypatch):
    monkeypatch.setattr(c_f, "COLLECT_STATS", True)
    loss_func = train(make_loss(name), make_miner("MultiSimilarityMiner"))
    assert dict(stats(loss_func))[".base_loss"] == loss_func.components["base"]


@pytest.mark.parametrize("name", miner_names())
def test_every_miner_mines_in_each_branch(name):
    if name == "EmbeddingsAlreadyPackagedAsTriplets":
        assert BATCH % 3 == 0
    loss_func = train(losses.TripletMarginLoss(margin=0.5), make_miner(name))
    own = [loss_func.miner, *(b.miner for b in loss_func.branches.values())]
    assert len({id(m) for m in own}) == 1 + len(DIMS)


def test_triplets_that_are_not_packaged_are_refused():
    miner = make_miner("EmbeddingsAlreadyPackagedAsTriplets")
    with pytest.raises(S2SDError, match="with EmbeddingsAlreadyPackagedAsTriplets refused"):
        S2SDLoss(losses.TripletMarginLoss(), miner, feature_dim=FEATURES, head_dims=DIMS)(
            torch.randn(20, SIZE), torch.arange(20) // 2, features=torch.randn(20, FEATURES)
        )


@pytest.mark.parametrize("name", sorted(NO_INDICES_TUPLE - {"ManifoldLoss"}))
def test_pairs_are_refused_by_losses_that_take_none(name):
    args, others = (labels(),), {}
    if name in ("SelfSupervisedLoss", "VICRegLoss"):
        args, others = (), {"ref_emb": torch.randn(BATCH, SIZE)}
    error = TypeError if name == "SelfSupervisedLoss" else ValueError
    given = hardest(torch.randn(BATCH, SIZE))
    refused(make_loss(name), None, error, "indices_tuple", args=args, indices_tuple=given, **others)
    with pytest.raises(ArgumentError, match="takes no pairs or triplets.*Leave the miner out"):
        S2SDLoss(make_loss(name), miners.BatchHardMiner(), feature_dim=FEATURES)


@pytest.mark.parametrize("name", sorted(set(LOSSES) & NO_REF_EMB))
def test_ref_emb_is_refused_by_losses_that_take_none(name):
    references = {"ref_emb": torch.randn(8, SIZE), "ref_labels": torch.arange(8) // 2}
    without = name in ("CrossBatchMemory", "MultipleLosses")
    args = () if name == "ManifoldLoss" else (labels(),)
    refused(
        make_loss(name),
        None,
        TypeError if without else ValueError,
        "ref_emb",
        args=args,
        **references,
    )


@pytest.mark.parametrize("name", ["ManifoldLoss", "VICRegLoss"])
def test_labels_are_refused_by_losses_that_take_none(name):
    refused(make_loss(name), None, ValueError, "not supported")


@pytest.mark.parametrize("name", ["TripletMarginLoss", "ArcFaceLoss", "InstanceLoss"])
def test_missing_labels_are_refused(name):
    refused(make_loss(name), None, ValueError, "labels", args=())


def test_manifold_takes_meta_classes_as_indices_tuple():
    loss_func = train(make_loss("ManifoldLoss"))
    embeddings = torch.randn(BATCH, SIZE)
    classes = torch.arange(BATCH) % loss_func.loss.K
    loss_func(embeddings, indices_tuple=classes, features=torch.randn(BATCH, FEATURES))
    expected = loss_func.loss(embeddings, indices_tuple=classes)
    assert torch.equal(loss_func.components["base"], expected.reshape(()))


def test_vicreg_without_ref_emb_compares_with_itself():
    loss_func = S2SDLoss(losses.VICRegLoss(), feature_dim=FEATURES, head_dims=DIMS)
    embeddings = torch.randn(BATCH, SIZE, requires_grad=True)
    loss_func(embeddings, features=torch.randn(BATCH, FEATURES)).backward()
    assert torch.equal(loss_func.components["base"], losses.VICRegLoss()(embeddings))


def test_margin_loss_with_a_learnable_beta_for_each_class():
    loss = losses.MarginLoss(learn_beta=True, num_classes=CLASSES, nu=0.1)
    loss_func = train(loss, make_miner("DistanceWeightedMiner"))
    assert len({id(b.loss.beta) for b in loss_func.branches.values()} | {id(loss.beta)}) == 3


def test_generic_pair_loss_is_abstract():
    loss = losses.GenericPairLoss(mat_based_loss=True)
    refused(loss, None, TypeError, "_compute_loss")


def test_dynamic_soft_margin_keeps_its_graph_between_calls():
    """PML issue 731: its histogram is part of the graph of every call before."""

    def two_steps(loss, **features):
        embedder = nn.Linear(FEATURES, SIZE)
        for _ in range(2):
            loss(embedder(torch.randn(BATCH, FEATURES)), labels(), **features).backward()

    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        two_steps(losses.DynamicSoftMarginLoss())
    loss_func = S2SDLoss(losses.DynamicSoftMarginLoss(), feature_dim=FEATURES, head_dims=DIMS)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        two_steps(loss_func, features=torch.randn(BATCH, FEATURES))


def test_threshold_consistent_margin_ignores_ref_emb():
    """PML reads the rows of ``ref_emb`` from ``embeddings``."""
    loss, embeddings = losses.ThresholdConsistentMarginLoss(), torch.randn(BATCH, SIZE)
    values = [
        loss(embeddings, labels(), ref_emb=torch.randn(BATCH, SIZE), ref_labels=labels())
        for _ in range(2)
    ]
    assert values[0] == values[1]


@pytest.mark.skipif(not hasattr(losses, "SmoothAPLoss"), reason="came with PML 2.9")
def test_smooth_ap_wants_labels_in_blocks():
    """PML reads the positives by position: mixing the rows changes its value."""
    loss, embeddings, mixed = losses.SmoothAPLoss(), torch.randn(BATCH, SIZE), torch.randperm(BATCH)
    assert loss(embeddings, labels()) != pytest.approx(
        loss(embeddings[mixed], labels()[mixed]).item(), rel=1e-3
    )
