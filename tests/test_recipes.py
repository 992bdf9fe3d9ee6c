"""Settings by name: whole, a copy each time, and the paper's are the defaults."""

import inspect

import pytest
import torch
from helpers import Model, images, labels
from pytorch_metric_learning import losses

from s2sd_pml import S2SDLoss, errors, recipes


def test_the_papers_are_the_defaults():
    defaults = {k: p.default for k, p in inspect.signature(S2SDLoss).parameters.items()}
    paper = S2SDLoss.recipe("paper")
    assert paper == {name: defaults[name] for name in paper}


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_names_every_setting_of_distillation_and_trains(name):
    settings = S2SDLoss.recipe(name)
    assert set(settings) == set(S2SDLoss.recipe("paper"))
    model = Model()
    loss_func = S2SDLoss(losses.NTXentLoss(), embedder=model.embedder, **settings)
    kind = settings.pop("head")
    assert all(type(branch.head) is kind for branch in loss_func.branches.values())
    for key, value in settings.items():
        assert getattr(loss_func, key) == value
    loss_func(model(images(12)), labels(12, 3)).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_recipe_can_be_changed_without_changing_the_next():
    S2SDLoss.recipe("small-data")["distill_weight"] = 1
    assert S2SDLoss.recipe("small-data")["distill_weight"] == 10


def test_an_unknown_recipe_is_named_with_those_there_are():
    with pytest.raises(errors.ArgumentError, match="'big-data' is none of 'paper', 'small-data'"):
        S2SDLoss.recipe("big-data")
