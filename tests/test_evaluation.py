"""Evaluation in other people's loops: what the loss is there, and a mode that is left on."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from helpers import F_DIM, Model, images, labels
from pytorch_metric_learning import losses, miners

from s2sd_pml import S2SDLoss
from s2sd_pml.errors import S2SDWarning


def make(loss=None, **kwargs):
    torch.manual_seed(0)
    model = Model()
    kwargs = {"embedder": model.embedder, "head_dims": (8, 9), "feature_distill_delay": 0, **kwargs}
    return model, S2SDLoss(loss or losses.ContrastiveLoss(), **kwargs)


# Evaluation in training mode


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_trainer_evaluates_in_training_mode(context):
    """As Hugging Face's trainers do with a loss outside of the model: its mode stays."""
    model, loss_func = make(miner=miners.MultiSimilarityMiner())
    loss_func(model(images()), labels()).backward()
    keys = list(loss_func.components)
    model.eval()
    with context():
        embeddings = model(images())
        value = loss_func(embeddings, labels())
    alone = losses.ContrastiveLoss()(
        embeddings, labels(), miners.MultiSimilarityMiner()(embeddings, labels())
    )
    assert torch.equal(value, alone)
    assert loss_func.step == 1
    assert loss_func.training
    assert list(loss_func.components) == keys
    assert loss_func.components["base"] == value
    assert loss_func.components["distill"] == 0
    model.train()
    loss_func(model(images()), labels()).backward()
    assert loss_func.step == 2
    assert loss_func.components["distill"] > 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_loss_that_was_never_trained_is_evaluated_first(context):
    """A sanity check before training, as Lightning's."""
    model, loss_func = make()
    with context():
        loss_func(model(images()), labels())
    assert loss_func.step == 0
    assert len(loss_func.components) == 8


def test_with_features_the_whole_objective_is_evaluated():
    model, loss_func = make(distill_weight=lambda step: 1.0 + step)
    x = images()
    phi = model.trunk(x).mean(dim=(2, 3))
    trained = loss_func(model(x), labels(), features=phi)
    loss_func.step = 0
    with torch.no_grad():
        evaluated = loss_func(model(x), labels(), features=phi)
    torch.testing.assert_close(evaluated, trained.detach())
    assert loss_func.step == 0


def test_without_an_embedder_evaluation_needs_no_features():
    model, loss_func = make(embedder=None, feature_dim=F_DIM)
    with torch.no_grad():
        loss_func(model(images()), labels())


def test_components_have_the_keys_and_shapes_of_training_in_every_mode():
    model, loss_func = make()
    loss_func(model(images()), labels()).backward()
    trained = {name: value.shape for name, value in loss_func.components.items()}
    for mode in (True, False):
        with torch.no_grad():
            loss_func.train(mode)(model(images()), labels())
        assert {name: value.shape for name, value in loss_func.components.items()} == trained


# A loss that stays in eval() mode


def loop(model, loss_func, optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_func(model(images()), labels()).backward()
        optimizer.step()


@pytest.fixture
def caught():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, foreach=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 9])
def test_only_the_model_is_put_back_to_train(name, before, caught):
    if "fused" in name and torch.__version__ < "2.4":
        pytest.skip("fused on the CPU is newer")
    model, loss_func = make()
    optimizer = OPTIMIZERS[name]([*model.parameters(), *loss_func.parameters()])
    loop(model, loss_func, optimizer, steps=before)
    model.eval()
    loss_func.eval()
    with torch.no_grad():
        loss_func(model(images()), labels())
    model.train()
    assert not caught
    loop(model, loss_func, optimizer, steps=8)
    (warning,) = caught
    assert warning.category is S2SDWarning
    assert "Call loss_func.train() after validation" in str(warning.message)
    assert warning.filename == __file__


def test_it_is_seen_among_the_steps_of_another_model(caught):
    model, loss_func = make()
    other = torch.nn.Linear(2, 2)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (other, model)]
    loss_func.eval()(model(images()), labels()).backward()
    other(torch.ones(1, 2)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert len(caught) == 1


def validation(model, loss_func, way):
    loss_func.eval()
    value = loss_func(model(images().requires_grad_()), labels())
    if way == "saliency":
        value.backward()
    loss_func.train()


@pytest.mark.parametrize("way", ["without no_grad", "saliency"])
def test_validation_with_gradients_is_silent(way, caught):
    model, loss_func = make()
    optimizer = torch.optim.SGD([*model.parameters(), *loss_func.parameters()], lr=0.01)
    for _ in range(9):
        validation(model, loss_func, way)
        loop(model, loss_func, optimizer)
    assert not caught


def test_what_is_trained_before_the_model_through_its_eval_loss_is_silent(caught):
    """Adversarial inputs, or a generator: the model itself is not stepped."""
    model, loss_func = make()
    noise = torch.nn.Parameter(torch.zeros(24, 3, 4, 4))
    inputs = torch.optim.SGD([noise], lr=0.1)
    optimizer = torch.optim.AdamW([*model.parameters(), *loss_func.parameters()])
    for _ in range(7):
        loss_func.eval()(model(images() + noise), labels()).backward()
        inputs.step()
        loss_func.train()
        loop(model, loss_func, optimizer)
    assert not caught


@pytest.mark.parametrize("how", ["frozen", "its base loss", "no S2SD in it"])
def test_training_with_the_base_loss_on_purpose_is_silent(how, caught):
    """As ``freeze_these=("metric_loss",)`` of PML's trainers, and as the message suggests."""
    nothing = {"head_dims": (), "feature_distill_weight": 0} if how == "no S2SD in it" else {}
    model, loss_func = make(**nothing)
    loss_func.requires_grad_(how != "frozen").eval()
    used = loss_func.loss if how == "its base loss" else loss_func
    loop(model, used, torch.optim.SGD(model.parameters(), lr=0.01), steps=9)
    assert not caught


def test_a_loss_with_feature_distillation_alone_is_watched_too(caught):
    model, loss_func = make(head_dims=())
    loop(model, loss_func.eval(), torch.optim.SGD(model.parameters(), lr=0.01))
    assert len(caught) == 1


def test_a_kept_value_does_not_keep_the_loss_alive():
    model, loss_func = make()
    value = loss_func.eval()(model(images()), labels())
    value.backward()
    dead = [weakref.ref(loss_func), weakref.ref(loss_func._guard)]
    del model, loss_func
    gc.collect()
    assert value.grad_fn is not None
    assert [ref() for ref in dead] == [None, None]


def test_a_function_transform_in_eval_mode():
    _, loss_func = make()
    z = torch.randn(24, 6)
    grad = torch.func.grad(lambda z: loss_func.eval()(z, labels()))(z)
    assert torch.isfinite(grad).all()


# CrossBatchMemory


def memory(size=60):
    return losses.CrossBatchMemory(losses.ContrastiveLoss(), 6, memory_size=size)


def queue(loss):
    state = (loss.embedding_memory, loss.label_memory)
    return [t.clone() for t in state], loss.queue_idx, loss.has_been_filled


EVALUATIONS = {
    "eval()": lambda model, f, x: f.eval()(model(x), labels()),
    "no_grad": lambda model, f, x: torch.no_grad()(f)(model(x), labels()),
    "inference_mode": lambda model, f, x: torch.inference_mode()(f)(model(x), labels()),
    "no_grad with features": lambda model, f, x: torch.no_grad()(f)(
        model(x), labels(), features=model.trunk(x).mean(dim=(2, 3))
    ),
}


@pytest.mark.parametrize("how", EVALUATIONS)
@pytest.mark.parametrize("size", [60, 30])  # not filled, and filled
def test_validation_data_stay_out_of_the_memory(how, size):
    model, loss_func = make(memory(size))
    for _ in range(2):
        loss_func(model(images()), labels()).backward()
    every = [loss_func.loss, *(branch.loss for branch in loss_func.branches.values())]
    before, twin, x = [queue(m) for m in every], copy.deepcopy(loss_func.loss), images()
    EVALUATIONS[how](model, loss_func, x)
    for m, (tensors, place, filled) in zip(every, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(queue(m)[0], tensors, strict=True))
        assert (m.queue_idx, m.has_been_filled) == (place, filled)
    expected = twin(model(x), labels())  # PML's own value, which the batch is a part of
    torch.testing.assert_close(loss_func.components["base"], expected.detach())
    loss_func.train()(model(images()), labels()).backward()
    assert loss_func.loss.queue_idx != before[0][1]


def test_a_memory_among_several_losses_is_kept_too():
    both = losses.MultipleLosses([memory(), losses.ContrastiveLoss()])
    model, loss_func = make(both)
    loss_func(model(images()), labels()).backward()
    loss_func.eval()(model(images()), labels()).backward()
    assert [m.queue_idx for m in loss_func.modules() if hasattr(m, "queue_idx")] == [24] * 3


def test_an_error_in_evaluation_puts_the_memory_back():
    model, loss_func = make(memory(30))
    loss_func(model(images()), labels()).backward()
    kept = loss_func.loss.embedding_memory
    with pytest.raises(ValueError, match="CrossBatchMemory refused"):
        loss_func.eval()(model(images(40)), labels(40))
    assert loss_func.loss.embedding_memory is kept
