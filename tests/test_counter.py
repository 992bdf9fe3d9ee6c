"""The training step: counted, set, saved, and read from former checkpoints."""

import copy
import io
import pickle

import pytest
import torch
from helpers import F_DIM, D
from pytorch_metric_learning import losses
from torch import nn

from s2sd_pml import S2SDLoss
from s2sd_pml.counter import StepCounter

KEY = "counter._extra_state"


def make(**kwargs):
    return S2SDLoss(losses.NTXentLoss(), feature_dim=F_DIM, head_dims=(5, 7), **kwargs)


def train(loss_func, steps):
    for _ in range(steps):
        loss_func(torch.randn(8, D), torch.arange(8) // 2, features=torch.randn(8, F_DIM))
    return loss_func


class Run(nn.Module):
    """A user's module that has the loss inside."""

    def __init__(self):
        super().__init__()
        self.model = nn.Linear(3, 2)
        self.criterion = make()


def test_the_step_is_a_python_number():
    loss_func = train(make(), 3)
    assert (loss_func.step, type(loss_func.step)) == (3, int)
    loss_func.step = torch.tensor(41)
    assert (loss_func.step, type(loss_func.step)) == (41, int)
    assert train(loss_func, 1).step == 42
    assert not list(loss_func.counter.parameters())


def test_what_is_no_training_step_is_not_counted():
    loss_func = make()
    with torch.no_grad():
        train(loss_func, 2)
    train(loss_func.eval(), 2)
    assert loss_func.step == 0
    with pytest.raises(ValueError, match="8 embeddings"):
        loss_func.train()(torch.randn(8, D), torch.arange(8), features=torch.randn(7, F_DIM))
    assert loss_func.step == 0


def test_a_setter_moves_the_start_of_feature_distillation():
    loss_func = make(feature_distill_delay=10)
    for step, begun in ((8, False), (9, False), (10, True)):
        loss_func.step = step
        train(loss_func, 1)
        assert (loss_func.components["feature_distill"] > 0) == begun
        assert loss_func.step == step + 1


@pytest.mark.parametrize("inside", [False, True])
def test_the_step_is_saved_as_a_tensor(inside):
    saved, fresh = Run(), Run()
    train(saved.criterion, 3)
    saved, fresh = (run if inside else run.criterion for run in (saved, fresh))
    state = saved.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())  # for safetensors
    key = f"criterion.{KEY}" if inside else KEY
    assert (state[key].item(), state[key].dtype) == (3, torch.int64)
    assert not [k for k in state if "_compiled" in k]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert (fresh.criterion if inside else fresh).step == 3


@pytest.mark.parametrize("step", [torch.tensor(7), torch.tensor([7]), torch.tensor(7.0), 7])
@pytest.mark.parametrize("inside", [False, True])
def test_former_checkpoints_with_a_buffer_load(inside, step):
    run = Run()
    module, prefix = (run, "criterion.") if inside else (run.criterion, "")
    state = module.state_dict()
    del state[f"{prefix}{KEY}"]
    state[f"{prefix}step"] = step
    before = dict(state)
    assert str(module.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
    assert run.criterion.step == 7
    assert list(state) == list(before)  # the user's dictionary stays


def test_a_checkpoint_without_any_step_is_refused():
    loss_func = make()
    state = loss_func.state_dict()
    del state[KEY]
    with pytest.raises(RuntimeError, match="counter._extra_state"):
        loss_func.load_state_dict(state)
    train(loss_func, 2).load_state_dict(state, strict=False)
    assert loss_func.step == 2


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_keep_the_step_and_count_on_their_own(copied):
    loss_func = train(make(), 3)
    twin = train(copied(loss_func), 2)
    assert (loss_func.step, twin.step) == (3, 5)


def test_the_step_of_compiled_forwards_adds_up(monkeypatch):
    """As torch.compile has it: steps are counted on the device."""
    counter = StepCounter()
    counter.tick()
    monkeypatch.setattr("s2sd_pml.counter.is_compiling", lambda: True)
    for _ in range(4):
        counter.tick()
    assert [bool(counter.has_reached(step)) for step in (4, 5, 6)] == [True, True, False]
    assert isinstance(counter.has_reached(5), torch.Tensor)
    monkeypatch.undo()
    counter.tick()
    assert (counter.count, int(counter.get_extra_state())) == (6, 6)
    assert [counter.has_reached(step) for step in (5, 6, 7)] == [True, True, False]
    for twin in (copy.deepcopy(counter), pickle.loads(pickle.dumps(counter))):
        assert twin.count == 6
    counter.count = 2
    assert counter.count == 2
    assert not counter.has_reached(3)
    monkeypatch.setattr("s2sd_pml.counter.is_compiling", lambda: True)
    counter.tick()
    assert [bool(counter.has_reached(step)) for step in (3, 4)] == [True, False]
    assert counter.count == 3


@pytest.mark.parametrize("change", ["half", "double", "bfloat16"])
def test_the_step_has_no_precision(change):
    loss_func = make()
    loss_func.step = 70_001
    getattr(loss_func, change)()
    assert loss_func.step == 70_001
    assert loss_func.state_dict()[KEY] == 70_001


def test_eager_steps_after_compiled_ones_leave_the_number_that_is_compiled_in(monkeypatch):
    counter = StepCounter()
    counter.count = 5
    monkeypatch.setattr("s2sd_pml.counter.is_compiling", lambda: True)
    counter.tick()
    monkeypatch.undo()
    for _ in range(3):
        counter.tick()
    assert counter._eager == 5  # another would compile the loss anew
    assert counter.count == 9
