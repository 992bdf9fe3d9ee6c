"""The warning for heads that no optimizer moves: when it comes, and when it must not."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers import Model, images, labels
from pytorch_metric_learning import losses

from s2sd_pml import S2SDLoss
from s2sd_pml.errors import OptimizerWarning


def run(model, loss_func, optimizer, steps=12, accumulate=1, schedule=None):
    """A loop that records the OptimizerWarnings it meets."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            (loss_func(model(images()), labels()) / accumulate).backward()
            if (step + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                if schedule is not None:
                    schedule.step()
    return [w for w in caught if w.category is OptimizerWarning]


def make(**kwargs):
    model = Model()
    kwargs = {"head_dims": (8, 9), "feature_distill_delay": 0, **kwargs}
    return model, S2SDLoss(losses.NTXentLoss(), embedder=model.embedder, **kwargs)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_forgotten_heads_are_told_once_with_the_mend(accumulate):
    model, loss_func = make()
    optimizer = torch.optim.Adam(model.parameters())
    caught = run(model, loss_func, optimizer, steps=9 * accumulate, accumulate=accumulate)
    assert len(caught) == 1
    text = str(caught[0].message)
    for words in ("2 of the 2", "head_8, head_9", "loss_func.add_to(optimizer)"):
        assert words in text
    assert "metric_loss_optimizer" in text
    assert caught[0].filename == __file__  # it points to the call in the user's loop


def test_it_comes_after_five_steps_of_the_model():
    model, loss_func = make()
    assert not run(model, loss_func, torch.optim.SGD(model.parameters(), 0.1), steps=5)
    assert run(model, loss_func, torch.optim.SGD(model.parameters(), 0.1), steps=1)


def test_one_head_left_out_is_named():
    model, loss_func = make()
    optimizer = torch.optim.Adam(
        [*model.parameters(), *loss_func.branches["head_8"].head.parameters()]
    )
    (caught,) = run(model, loss_func, optimizer)
    assert "1 of the 2 auxiliary heads never changed (head_9)" in str(caught.message)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("lr", [0.0, 1e-3])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_heads_in_the_optimizer_are_quiet_at_any_learning_rate(name, lr, foreach):
    model, loss_func = make()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=lr, foreach=foreach)
    loss_func.add_to(optimizer)
    assert not run(model, loss_func, optimizer)


def test_a_warm_up_from_zero_is_quiet():
    model, loss_func = make()
    optimizer = torch.optim.Adam([*model.parameters(), *loss_func.parameters()])
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0, step - 6) / 10)
    assert not run(model, loss_func, optimizer, schedule=warm_up)


def test_gradient_accumulation_without_a_step_is_quiet():
    model, loss_func = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert not run(model, loss_func, optimizer, steps=20, accumulate=50)


def test_an_optimizer_that_writes_to_data_is_quiet():
    class OldSGD(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(p.grad, alpha=-0.1)

    model, loss_func = make()
    old = OldSGD(loss_func.parameters())
    new = torch.optim.SGD(model.parameters(), lr=0.1)

    class Both:
        def step(self):
            old.step()
            new.step()

        def zero_grad(self):
            old.zero_grad()
            new.zero_grad()

    assert not run(model, loss_func, Both())


def test_frozen_heads_a_frozen_model_and_no_heads_are_quiet():
    model, loss_func = make()
    for branch in loss_func.branches.values():
        branch.head.requires_grad_(False)
    assert not run(model, loss_func, torch.optim.SGD(model.parameters(), lr=0.1))
    model, loss_func = make(head_dims=())
    assert not run(model, loss_func, torch.optim.SGD(model.parameters(), lr=0.1))
    model, loss_func = make()
    model.trunk.requires_grad_(False)
    assert not run(model, loss_func, torch.optim.SGD(loss_func.parameters(), lr=0.1))


def test_a_model_of_which_the_optimizer_holds_only_a_part_sets_the_pace():
    model, loss_func = make()
    assert run(model, loss_func, torch.optim.SGD(model.trunk.parameters(), lr=0.1))
    model, loss_func = make()
    assert run(model, loss_func, torch.optim.SGD([model.embedder.weight], lr=0.1))


def test_a_head_with_an_unused_parameter_is_quiet():
    class Head(torch.nn.Linear):
        def __init__(self, i, o):
            super().__init__(i, o)
            self.unused = torch.nn.Parameter(torch.ones(3))

    model, loss_func = make(head=Head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_func.add_to(optimizer)
    assert not run(model, loss_func, optimizer)


def test_copies_and_unpickled_losses_watch_anew():
    model, loss_func = make()
    run(model, loss_func, torch.optim.SGD(model.parameters(), lr=0.1), steps=2)
    twin = copy.deepcopy(loss_func)
    pickle.loads(pickle.dumps(loss_func))
    assert run(model, twin, torch.optim.SGD(model.parameters(), lr=0.1))
