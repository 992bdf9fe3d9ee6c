"""S2SDLoss from outside: its printout, its attributes and those of the base loss, its copies."""

import copy
import pickle
import re

import pytest
import torch
from pytorch_metric_learning import losses, miners
from torch import nn

from s2sd_pml import S2SDLoss
from s2sd_pml.errors import ArgumentError

LOSS, LINEAR, CONV = losses.TripletMarginLoss(), nn.Linear(12, 6), nn.Conv2d(3, 12, 1)


def proxies_loss(**kwargs):
    settings = {"feature_dim": 12, "head_dims": (8, 9), **kwargs}
    return S2SDLoss(losses.ProxyAnchorLoss(4, 6), **settings)


def test_another_base_loss_cannot_be_assigned_but_a_wrapper_of_it():
    loss_func = proxies_loss()
    with pytest.raises(ArgumentError, match=r"loss=TripletMarginLoss cannot be assigned.*loss="):
        loss_func.loss = LOSS
    assert type(loss_func.loss) is losses.ProxyAnchorLoss
    loss_func.loss = wrapped = nn.Sequential(loss_func.loss)
    assert loss_func.loss is wrapped


def test_a_module_assigned_as_pooling_stays_the_models():
    loss_func = proxies_loss()
    before = [*loss_func.state_dict()]
    loss_func.pooling = nn.Linear(20, 12)
    assert loss_func.project(torch.randn(5, 20))[8].shape == (5, 8)
    assert [*loss_func.state_dict()] == before
    loss_func.pooling = "avg"
    assert loss_func.project(torch.randn(5, 12, 2, 2))[8].shape == (5, 8)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("head_dims", (64,)),
        ("feature_dim", 13),
        ("embedder", LINEAR),
        ("trunk", CONV),
        ("head", nn.Linear),
        ("embedding_size", 7),
    ],
)
def test_what_the_loss_was_built_for_cannot_be_assigned(name, value):
    loss_func = proxies_loss()
    before = repr(loss_func)
    with pytest.raises(ArgumentError, match=rf"{name}=.*cannot be assigned.*\(..., {name}=...\)"):
        setattr(loss_func, name, value)
    assert repr(loss_func) == before
    with pytest.raises(ArgumentError, match=name):
        setattr(pickle.loads(pickle.dumps(loss_func)), name, value)
    # as suggested
    assert repr(proxies_loss(**{name: value})).startswith("S2SDLoss")


def test_the_printout_has_every_setting():
    given = {
        "feature_dim": 12,
        "head_dims": (8, 9),
        "distill_weight": 3.0,
        "temperature": 0.25,
        "feature_distill_weight": 4.0,
        "feature_distill_delay": 77,
        "pooling": "avg+max",
        "exclude_self": True,
        "chunk_size": 5,
        "gather_distributed": True,
    }
    lines = repr(S2SDLoss(LOSS, **given)).replace("\n", " ")
    for name, value in given.items():
        assert f"{name}={value!r}" in lines


def test_attributes_of_the_base_loss_are_reached():
    proxy, arc = proxies_loss(), S2SDLoss(losses.ArcFaceLoss(4, 6), feature_dim=12, head_dims=(8,))
    assert proxy.proxies is proxy.loss.proxies
    assert proxy.num_classes == 4
    assert arc.W is arc.loss.W
    assert arc.get_logits(torch.randn(3, 6)).shape == (3, 4)
    assert arc.head_dims == (8,)  # its own come first
    assert {n for n, _ in arc.named_parameters() if n.count(".") == 1} == {"loss.W"}


def test_attributes_that_nobody_has_name_the_base_loss():
    loss_func = proxies_loss()
    with pytest.raises(AttributeError, match=r"no 'W'.*loss_func\.loss.*ProxyAnchorLoss"):
        _ = loss_func.W
    assert not hasattr(loss_func, "_load_from_nothing")
    assert getattr(loss_func, "no_such", None) is None
    with pytest.raises(AttributeError, match="'_hidden'") as caught:
        _ = loss_func._hidden
    assert "loss_func.loss" not in str(caught.value)


def test_initialisers_and_frameworks_see_no_weight_of_the_base_loss():
    class Weighted(losses.ContrastiveLoss):
        def __init__(self):
            super().__init__()
            self.weight, self.bias, self.module = torch.ones(3), torch.ones(3), self.reducer

        def reset_parameters(self):
            raise AssertionError("called")

    loss_func = S2SDLoss(Weighted(), feature_dim=12, head_dims=(8,))
    for name in ("weight", "bias", "reset_parameters", "init_weights", "module"):
        assert not hasattr(loss_func, name)
    with pytest.raises(AttributeError, match=r"no 'weight'\. Use loss_func\.loss\.weight"):
        _ = loss_func.weight
    assert loss_func.loss.weight.shape == (3,)  # as suggested


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_have_their_own_base_loss(copied):
    loss_func = proxies_loss()
    other = copied(loss_func)
    assert other.head_dims == (8, 9)
    assert other.proxies is other.loss.proxies
    torch.testing.assert_close(other.proxies, loss_func.proxies)
    blank = S2SDLoss.__new__(S2SDLoss)  # before __init__, as copy and pickle have it
    for name in ("loss", "proxies", "head_dims", "_modules"):
        assert not hasattr(blank, name)


def test_attributes_of_the_base_losses_are_assigned_to_each():
    loss_func = S2SDLoss(losses.ContrastiveLoss(), feature_dim=12, head_dims=(8, 9))
    with pytest.raises(
        ArgumentError, match="pos_margin=0.5 would not reach the base loss"
    ) as caught:
        loss_func.pos_margin = 0.5
    (fix,) = re.findall("size: (.*)", str(caught.value))
    exec(fix, {"loss_func": loss_func})
    every = [loss_func.loss, *(branch.loss for branch in loss_func.branches.values())]
    assert [loss.pos_margin for loss in every] == [0.5] * 3
    loss_func.note = "of the user's own"


def test_a_base_loss_with_names_of_ours_is_taken():
    memory = losses.CrossBatchMemory(losses.ContrastiveLoss(), 6, miner=miners.BatchHardMiner())
    loss_func = S2SDLoss(memory, feature_dim=12, head_dims=(8,))
    copy.deepcopy(loss_func).miner = None
    assert loss_func.miner is None
    assert loss_func.loss.miner is not None


def test_a_tensor_that_would_not_reach_the_base_losses_is_not_printed():
    loss_func = S2SDLoss(losses.ArcFaceLoss(6, 6), feature_dim=12, head_dims=(8, 9))
    with pytest.raises(ArgumentError, match=r"W=<value> .*: m\.loss\.W = <value>$"):
        loss_func.W = nn.Parameter(torch.zeros(6, 6))


def test_a_subclass_may_have_more_attributes():
    class Mine(S2SDLoss):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.trunk, self.margin = nn.Linear(2, 2), 0.3

    mine = Mine(losses.TripletMarginLoss(), feature_dim=12, head_dims=(8,))
    assert mine.margin == 0.3
    with pytest.raises(ArgumentError, match="head_dims"):
        mine.head_dims = (9,)
