"""Matryoshka students in training: proxies of prefixes, what is reported, a run that goes on."""

import io
import warnings

import pytest
import torch
from helpers import F_DIM, D, Model, images, labels
from pytorch_metric_learning import losses
from torch import nn

from s2sd_pml import S2SDLoss
from s2sd_pml.errors import OptimizerWarning, S2SDWarning

LINEAR, Y = nn.Linear(F_DIM, D), labels()


def test_every_prefix_has_proxies_of_its_own_from_a_loss_or_a_factory():
    for loss in (losses.ProxyAnchorLoss(6, D), lambda dim: losses.ProxyAnchorLoss(6, dim)):
        loss_func = S2SDLoss(loss, embedder=LINEAR, head_dims=(9,), matryoshka_dims=(4, 2))
        shapes = [of.loss.proxies.shape for of in loss_func.branches.values()]
        assert [width for _, width in shapes] == [4, 2, 9]
        heads, others = loss_func.param_groups(0.1, loss_lr=0.3)
        assert len(others["params"]) == 4
        assert len(heads["params"]) == 4
        model = Model()
        loss_func.capture = type(loss_func.capture)(model.embedder)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss_func.add_to(optimizer)
        before = [p.detach().clone() for p in loss_func.parameters()]
        loss_func(model(images()), Y).backward()
        optimizer.step()
        assert not any(map(torch.equal, before, loss_func.parameters()))


def train(loss_func, model, optimizer, steps=8):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_func(model(images()), Y).backward()
        optimizer.step()


def watched(head_dims):
    model = Model()
    loss = losses.ProxyAnchorLoss(6, D)
    kwargs = {"head_dims": head_dims, "feature_distill_weight": 0, "matryoshka_dims": (2, 4)}
    return model, S2SDLoss(loss, embedder=model.embedder, **kwargs)


@pytest.mark.parametrize("head_dims", [(), (8,)])
def test_forgotten_proxies_of_prefixes_are_reported(head_dims):
    model, loss_func = watched(head_dims)
    heads = [b.head for b in loss_func.branches.values()]
    held = [model, loss_func.loss, *heads]
    optimizer = torch.optim.SGD([p for m in held for p in m.parameters()], lr=0.01)
    words = rf"2 of the {2 + len(head_dims)} auxiliary heads and prefixes.*prefix_2, prefix_4"
    with pytest.warns(OptimizerWarning, match=words):
        train(loss_func, model, optimizer)


@pytest.mark.parametrize("head_dims", [(), (8,)])
def test_proxies_at_a_high_rate_give_no_warning(head_dims):
    model, loss_func = watched(head_dims)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    loss_func.add_to(optimizer, loss_lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(loss_func, model, optimizer)
    assert loss_func._guard._done


def test_training_in_eval_mode_is_reported():
    model, loss_func = watched(())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with pytest.warns(S2SDWarning, match="in eval.. mode"):
        train(loss_func.eval(), model, optimizer, 2)


def test_a_run_goes_on_from_its_state():
    model, loss_func = watched((8,))
    optimizer = torch.optim.Adam([*model.parameters(), *loss_func.parameters()], lr=0.01)
    train(loss_func, model, optimizer, 3)
    file = io.BytesIO()
    torch.save([model.state_dict(), loss_func.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    model2, loss2 = watched((8,))
    optimizer2 = torch.optim.Adam([*model2.parameters(), *loss2.parameters()], lr=0.01)
    states = torch.load(file, weights_only=True)
    for it, state in zip((model2, loss2, optimizer2), states, strict=True):
        it.load_state_dict(state)
    for parts in ((model, loss_func, optimizer), (model2, loss2, optimizer2)):
        torch.manual_seed(5)
        train(parts[1], parts[0], parts[2], 2)
    for p, q in zip(loss_func.parameters(), loss2.parameters(), strict=True):
        assert torch.equal(p, q)
    assert loss2.step == 5
