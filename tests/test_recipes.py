"""Settings by name: a copy each time; the paper's are the defaults; they fit all variants."""

import copy
import inspect
import pickle

import pytest
import torch
from helpers import F_DIM, Model, images, labels
from pytorch_metric_learning import losses

from s2sd_pml import S2SDLoss, errors, recipes

LOSS = losses.NTXentLoss()


def test_the_papers_are_the_defaults():
    defaults = {k: p.default for k, p in inspect.signature(S2SDLoss).parameters.items()}
    paper = S2SDLoss.recipe("fine-tuning")
    assert paper == {name: defaults[name] for name in paper}


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_names_every_setting_of_distillation_and_trains(name):
    settings = S2SDLoss.recipe(name)
    assert set(settings) == set(S2SDLoss.recipe("fine-tuning"))
    model = Model()
    loss_func = S2SDLoss(LOSS, embedder=model.embedder, **settings)
    kind = settings.pop("head")
    assert all(type(branch.head) is kind for branch in loss_func.branches.values())
    for key, value in settings.items():
        assert getattr(loss_func, key) == value
    assert type(loss_func.feature_distill_weight) is float
    assert type(loss_func.head_dims) is tuple
    loss_func(model(images(12)), labels(12, 3)).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_recipe_can_be_changed_without_changing_the_next():
    S2SDLoss.recipe("high-rate")["distill_weight"] = 1
    assert S2SDLoss.recipe("high-rate")["distill_weight"] == 10


def test_an_unknown_recipe_is_refused_with_those_that_exist():
    listed = "'fine-tuning', 'high-rate', 'from-scratch'"
    with pytest.raises(errors.ArgumentError, match=f"'big-data' is none of {listed}"):
        S2SDLoss.recipe("big-data")
    for name in ("fine-tuning", "high-rate", "from-scratch"):
        S2SDLoss.recipe(name)


# --- variants ---------------------------------------------------------------------------------


@pytest.mark.parametrize("carried", [dict, copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
@pytest.mark.parametrize("name", recipes.RECIPES)
@pytest.mark.parametrize("variant", recipes.VARIANTS)
def test_a_recipe_fits_every_variant(variant, name, carried):
    recipe = carried(S2SDLoss.recipe(name))
    loss_func = getattr(S2SDLoss, variant)(LOSS, feature_dim=20, **recipe)
    dims = (max(recipe["head_dims"]),) if variant == "dsd" else recipe["head_dims"]
    weight = recipe["feature_distill_weight"] if variant.startswith("msdf") else 0
    assert loss_func.head_dims == dims
    assert loss_func.feature_distill_weight == weight
    assert type(loss_func.feature_distill_weight) is float
    assert loss_func.pooling == ("avg+max" if variant == "msdfa" else "avg")
    for key in ("temperature", "distill_weight", "feature_distill_delay", "exclude_self"):
        assert getattr(loss_func, key) == recipe[key]


CHANGES = {
    "temperature": {"temperature": 0.2},
    "distill_weight": {"distill_weight": 3.0},
    "one head": {"head_dims": (7,)},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("variant", recipes.VARIANTS)
def test_a_changed_recipe_fits_too(variant, change):
    recipe = dict(S2SDLoss.recipe("high-rate"), **CHANGES[change])
    loss_func = getattr(S2SDLoss, variant)(LOSS, feature_dim=20, **recipe)
    for key, value in CHANGES[change].items():
        assert getattr(loss_func, key) == value


CONTRADICTIONS = [
    ("dsd", {"head_dims": (1, 2)}, "msd"),
    ("dsd", {"feature_distill_weight": 50}, "msdf"),
    ("msd", {"feature_distill_weight": 5}, "msdf"),
    ("msd", {"feature_distill_weight": 10.0}, "msdf"),  # as in the recipe, but by hand
    ("msd", {"feature_distill_weight": lambda step: 0.0}, "msdf"),
    ("msdf", {"feature_distill_weight": 0}, "msd"),
    ("msdfa", {"feature_distill_weight": 0.0}, "msd"),
    ("msdf", {"pooling": "avg+max"}, "msdfa"),
    ("msdfa", {"pooling": "avg"}, "msdf"),
    ("msdfa", {"pooling": lambda features: features}, "msdf"),
    *((variant, {"head_dims": ()}, "") for variant in recipes.VARIANTS),
]


@pytest.mark.parametrize("start", ["nothing", "high-rate", "fine-tuning"])
@pytest.mark.parametrize(("variant", "given", "instead"), CONTRADICTIONS)
def test_a_contradiction_is_refused_from_a_recipe_or_not(variant, given, instead, start):
    settings = dict(S2SDLoss.recipe(start)) if start != "nothing" else {}
    (name,) = given
    words = f"{name}=.* contradicts {variant.upper()}: .*Leave it out, or use S2SDLoss"
    with pytest.raises(errors.ArgumentError, match=words) as caught:
        getattr(S2SDLoss, variant)(LOSS, feature_dim=20, **{**settings, **given})
    assert (f"use S2SDLoss.{instead}(" if instead else "use S2SDLoss(") in str(caught.value)
    # both suggestions work
    getattr(S2SDLoss, variant)(LOSS, feature_dim=20, **settings)
    build = getattr(S2SDLoss, instead) if instead else S2SDLoss
    build(LOSS, feature_dim=20, **{**settings, **given})


def test_a_computed_weight_counts_as_given_by_hand():
    recipe = S2SDLoss.recipe("high-rate")
    recipe["feature_distill_weight"] *= 2
    with pytest.raises(errors.ArgumentError, match="feature_distill_weight=20.0 contradicts MSD"):
        S2SDLoss.msd(LOSS, feature_dim=20, **recipe)
    assert S2SDLoss.msdf(LOSS, feature_dim=20, **recipe).feature_distill_weight == 20


def test_what_agrees_with_the_name_is_taken():
    assert S2SDLoss.dsd(LOSS, feature_dim=20, head_dims=(9,)).head_dims == (9,)
    assert S2SDLoss.msd(LOSS, feature_dim=20, feature_distill_weight=0).feature_distill_weight == 0
    assert S2SDLoss.msd(LOSS, feature_dim=20, head_dims=(d for d in (8, 9))).head_dims == (8, 9)
    assert S2SDLoss.msdfa(LOSS, feature_dim=20, pooling="avg+max").pooling == "avg+max"
    schedule = S2SDLoss.msdf(LOSS, feature_dim=20, feature_distill_weight=lambda step: 0.0)
    assert schedule.feature_distill_weight(3) == 0


def test_a_variant_is_the_one_of_its_name_in_training():
    model = Model()
    settings = {**S2SDLoss.recipe("high-rate"), "feature_distill_delay": 0}
    for variant, distils in [("dsd", False), ("msd", False), ("msdf", True), ("msdfa", True)]:
        loss_func = getattr(S2SDLoss, variant)(
            LOSS, trunk=model.trunk, feature_dim=F_DIM, **settings
        )
        loss_func(model(images(12)), labels(12, 3)).backward()
        assert (loss_func.components["feature_distill"] > 0) == distils
