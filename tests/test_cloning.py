"""clone_loss: the right size, freshly drawn, sharing nothing."""

import pytest
import torch
from pml import CLASSES, EMBEDDING_SIZED, FAULTY, SIZE, loss_names, make_loss
from pytorch_metric_learning import losses, miners
from torch import nn

from s2sd_pml import clone_loss
from s2sd_pml.cloning import (
    EMBEDDING_AXES,
    SIZE_FREE_PARAMETERS,
    check_independent,
    clone_miner,
    make_base_loss,
)
from s2sd_pml.errors import ArgumentError, UnsupportedLossError

LOSSES = [n for n in loss_names() if n != "GenericPairLoss"]


@pytest.mark.parametrize("name", LOSSES)
def test_a_clone_shares_no_tensor_and_works_at_its_size(name):
    loss = make_loss(name)
    clone = clone_loss(loss, 20)
    assert type(clone) is type(loss)
    mine, theirs = ({t.data_ptr() for t in m.state_dict().values()} for m in (loss, clone))
    assert mine.isdisjoint(theirs)
    labels = torch.arange(CLASSES).repeat_interleave(4)
    embeddings = torch.randn(len(labels), 20, requires_grad=True)
    if name in ("SelfSupervisedLoss", "VICRegLoss"):
        value = clone(embeddings, ref_emb=torch.randn(len(labels), 20))
    elif name == "ManifoldLoss":
        value = clone(embeddings)
    else:
        value = clone(embeddings, labels)
    value.backward()
    assert torch.isfinite(embeddings.grad).all()


@pytest.mark.parametrize("name", EMBEDDING_SIZED)
@pytest.mark.parametrize("size", [SIZE, CLASSES, 20])
def test_embedding_sized_parameters_are_drawn_anew_on_the_right_axis(name, size):
    loss = make_loss(name)
    parameter, axis = EMBEDDING_SIZED[name]
    old = getattr(loss, parameter)
    with torch.no_grad():
        old.fill_(77.0)  # a trained value that must not be copied
    shape = list(old.shape)
    shape[axis] = size
    new = getattr(clone_loss(loss, size), parameter)
    assert list(new.shape) == shape
    assert isinstance(new, nn.Parameter)
    assert (new.abs() < 70).all()
    assert new.std() > 0
    assert (old == 77.0).all()


def test_a_square_matrix_is_resized_on_the_embedding_axis():
    assert clone_loss(losses.ArcFaceLoss(8, 8), 5).W.shape == (5, 8)
    assert clone_loss(losses.ProxyAnchorLoss(8, 8), 5).proxies.shape == (8, 5)


def test_the_registry_matches_the_parameters_that_pml_has():
    registered = {spec.parameter for spec in EMBEDDING_AXES.values()}
    for name in LOSSES:
        if name in ("MultipleLosses", "CrossBatchMemory", "SelfSupervisedLoss"):
            continue
        loss = make_loss(name)
        found = {n for n, _ in loss.named_parameters()}
        if name in EMBEDDING_SIZED:
            assert found == {EMBEDDING_SIZED[name][0]} <= registered
        else:
            assert found <= set(SIZE_FREE_PARAMETERS.get(type(loss), ()))


def test_the_initialiser_given_to_the_loss_is_used():
    loss = losses.NormalizedSoftmaxLoss(
        CLASSES, SIZE, weight_init_func=lambda w: torch.nn.init.constant_(w, 3.0)
    )
    assert (clone_loss(loss, 20).W == 3.0).all()


def test_p2sgrad_and_manifold_keep_their_size_attribute():
    p2s = clone_loss(make_loss("P2SGradLoss"), 20)
    assert p2s.descriptors_dim == 20
    torch.testing.assert_close(p2s.weight.norm(dim=0), torch.ones(CLASSES), rtol=5e-6, atol=0)
    assert abs(clone_loss(make_loss("P2SGradLoss"), 4000).weight.mean()) < 1e-3  # of ±0.014
    assert clone_loss(make_loss("ManifoldLoss"), 20).l == 20


def test_cross_batch_memory_is_cloned_with_an_empty_queue_and_its_inner_parts():
    inner = losses.CrossBatchMemory(losses.TripletMarginLoss(), SIZE, 32, miners.HDCMiner())
    inner(torch.randn(8, SIZE), torch.arange(8) // 2)
    clone = clone_loss(inner, 20)
    assert (clone.queue_idx, clone.has_been_filled) == (0, False)
    assert clone.embedding_memory.shape == (32, 20)
    assert clone.miner is not inner.miner
    assert inner.queue_idx == 8


def test_multiple_losses_are_cloned_recursively():
    several = losses.MultipleLosses(
        {"a": losses.CrossBatchMemory(losses.NTXentLoss(), SIZE), "b": losses.ArcFaceLoss(6, SIZE)}
    )
    clone = clone_loss(several, 20)
    assert clone.losses["a"].embedding_size == 20
    assert clone.losses["b"].W.shape == (20, 6)


def test_a_subclass_of_a_known_loss_is_known():
    class Mine(losses.SubCenterArcFaceLoss):
        pass

    assert clone_loss(Mine(num_classes=CLASSES, embedding_size=SIZE), 20).W.shape == (
        20,
        CLASSES * 3,
    )


def test_unknown_parameters_are_refused_and_a_factory_helps():
    class Learned(losses.TripletMarginLoss):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(SIZE))

    class More(losses.ArcFaceLoss):
        def __init__(self):
            super().__init__(CLASSES, SIZE)
            self.gate = nn.Linear(SIZE, 1)

    for loss, name in ((Learned(), "scale"), (More(), "gate.weight")):
        with pytest.raises(UnsupportedLossError, match=rf"'{name}'.*factory"):
            clone_loss(loss, 20)
    with pytest.raises(UnsupportedLossError, match="'scale'"):
        clone_loss(losses.MultipleLosses([Learned()]), 20)
    made = make_base_loss(lambda dim: More(), SIZE)
    assert made.gate.weight.shape == (1, SIZE)


def test_a_loss_that_cannot_be_copied_is_refused():
    loss = losses.TripletMarginLoss()
    loss.graph = torch.ones(1, requires_grad=True) * 2  # what DynamicSoftMarginLoss keeps
    with pytest.raises(UnsupportedLossError, match="cannot be copied.*before its first call"):
        clone_loss(loss, 20)
    clone_loss(losses.TripletMarginLoss(), 20)  # as suggested
    assert make_base_loss(lambda dim: losses.TripletMarginLoss(), 20) is not loss


def test_factories():
    loss = losses.TripletMarginLoss()
    assert make_base_loss(loss, None) is loss
    assert make_base_loss(lambda dim: losses.ArcFaceLoss(4, dim), 20).W.shape == (20, 4)
    with pytest.raises(
        ArgumentError, match="size of the base embedding is unknown.*embedding_size"
    ):
        make_base_loss(lambda dim: loss, None)
    with pytest.raises(UnsupportedLossError, match="failed for dimension 20.*called as factory"):
        make_base_loss(lambda: loss, 20)
    with pytest.raises(UnsupportedLossError, match="returned NoneType for dimension 20"):
        make_base_loss(lambda dim: None, 20)
    check_independent("loss", [loss, losses.TripletMarginLoss()])
    with pytest.raises(UnsupportedLossError, match="loss factory returned the same TripletMargin"):
        check_independent("loss", [loss, loss])


def test_frozen_parameters_stay_frozen():
    loss = make_loss("ProxyAnchorLoss")
    loss.proxies.requires_grad_(False)
    assert not clone_loss(loss, 20).proxies.requires_grad


def test_a_cloned_miner_starts_empty():
    miner = miners.HDCMiner()
    miner(torch.randn(8, SIZE), torch.arange(8) // 2)
    assert len(miner.a1) > 0
    clone = clone_miner(miner)
    assert clone is not miner
    assert clone.a1 is None
    assert len(miner.a1) > 0


def test_the_skips_name_losses_that_exist():
    assert set(FAULTY) <= set(loss_names())
