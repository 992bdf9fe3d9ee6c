"""A run is resumed and the loss is not: the warning, and what must not be taken for it."""

import copy
import warnings

import pytest
import torch
from helpers import Model, images, labels
from pytorch_metric_learning import losses

from s2sd_pml import S2SDLoss
from s2sd_pml.errors import S2SDWarning

OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "fused AdamW": lambda p: torch.optim.AdamW(p, fused=True),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "Adagrad": torch.optim.Adagrad,  # which has a state from the start
}


@pytest.fixture(params=OPTIMIZERS)
def kind(request):
    if "fused" in request.param and torch.__version__ < "2.4":
        pytest.skip("fused on the CPU is newer")
    return OPTIMIZERS[request.param]


def new(kind, heads="same"):
    """Model, loss and optimizers; the heads' are the model's, or of their own."""
    model = Model()
    loss_func = S2SDLoss(losses.NTXentLoss(), embedder=model.embedder, head_dims=(8, 9))
    if heads == "same":
        return model, loss_func, [kind([*model.parameters(), *loss_func.parameters()])]
    return model, loss_func, [kind(list(m.parameters())) for m in (model, loss_func)]


def run(model, loss_func, optimizers, steps=8):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss_func(model(images()), labels()).backward()
            for optimizer in optimizers:
                optimizer.step()
    return caught


def resumed(kind, heads, what):
    """A run, and a new one that goes on from it; the loss and its optimizer may be forgotten."""
    first, second = new(kind, heads), new(kind, heads)
    run(*first)
    parts = {"model": 0, "loss": 1}
    for name, place in parts.items():
        if name in what:
            second[place].load_state_dict(copy.deepcopy(first[place].state_dict()))
    for old, fresh, name in zip(first[2], second[2], ("optimizer", "heads"), strict=False):
        if name in what:
            fresh.load_state_dict(copy.deepcopy(old.state_dict()))
    return second


@pytest.mark.parametrize(
    ("heads", "what"),
    [
        ("same", {"model", "optimizer"}),  # as trainers do with a loss outside of the model
        ("own", {"model", "optimizer"}),
        ("own", {"model", "optimizer", "heads"}),
    ],
)
def test_model_and_optimizer_are_restored_without_the_loss(kind, heads, what):
    (caught,) = run(*resumed(kind, heads, what))
    assert caught.category is S2SDWarning
    assert "restore the loss too" in str(caught.message)
    assert caught.filename == __file__


@pytest.mark.parametrize("heads", ["same", "own"])
@pytest.mark.parametrize(
    "what", [{"model"}, {"model", "loss"}, {"model", "loss", "optimizer"}, {"loss"}, set()]
)
def test_other_starts_are_silent(kind, heads, what):
    """A pretrained model, a whole checkpoint, a new optimizer."""
    assert not run(*resumed(kind, heads, what))


def test_the_loss_restored_as_the_message_suggests(kind):
    model, loss_func, optimizers = resumed(kind, "same", {"model", "optimizer"})
    checkpoint = {"loss": run_before(kind).state_dict()}
    loss_func.load_state_dict(checkpoint["loss"])
    assert loss_func.step == 8
    assert not run(model, loss_func, optimizers)


def run_before(kind):
    model, loss_func, optimizers = new(kind)
    run(model, loss_func, optimizers)
    return loss_func


def test_s2sd_that_starts_in_the_middle_of_a_run_is_silent(kind):
    if kind is torch.optim.Adagrad and torch.__version__ < "2.4":
        pytest.skip("Adagrad has no state for groups that are added later")
    model = Model()
    optimizer = kind(list(model.parameters()))
    run(model, losses.NTXentLoss(), [optimizer])
    loss_func = S2SDLoss(losses.NTXentLoss(), embedder=model.embedder, head_dims=(8, 9))
    assert not run(model, loss_func.add_to(optimizer), [optimizer])


def test_two_losses_that_take_turns_are_silent(kind):
    model = Model()
    both = [S2SDLoss(losses.NTXentLoss(), embedder=model.embedder, head_dims=(8,)) for _ in "ab"]
    optimizers = [kind(list(m.parameters())) for m in (model, *both)]
    for loss_func in both:
        own = [optimizers[0], optimizers[1 + both.index(loss_func)]]
        assert not run(model, loss_func, own, steps=7)


def test_accumulated_forwards_before_the_first_step(kind):
    model, loss_func, (optimizer,) = resumed(kind, "same", {"model", "optimizer"})
    loss_func(model(images()), labels()).backward()
    loss_func(model(images()), labels()).backward()
    with pytest.warns(S2SDWarning, match="restore the loss too"):
        optimizer.step()


def test_a_learning_rate_finder_that_resets_model_and_optimizer():
    """The lines of docs/deploy.md: heads and step are as before the range test."""
    model, loss_func, (adam,) = new(torch.optim.Adam)
    run_states = [copy.deepcopy(part.state_dict()) for part in (model, loss_func, adam)]
    run(model, loss_func, [adam])
    for part, state in zip((model, loss_func, adam), run_states, strict=True):
        part.load_state_dict(state)
    assert loss_func.step == 0
    assert not run(model, loss_func, [adam])
