"""The warnings about the heads' optimizer: when they come, and when they must not."""

import copy
import gc
import pickle
import sys
import warnings
import weakref

import pytest
import torch
from helpers import Model, images, labels
from processes import on_ranks
from pytorch_metric_learning import losses
from torch import nn

from s2sd_pml import S2SDLoss, optimizer
from s2sd_pml.errors import OptimizerWarning

LATE = optimizer.LATE


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
def test_forgotten_heads_are_reported_once_with_the_fix(accumulate):
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
    assert loss_func._guard._done
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


class Data(torch.optim.Optimizer):
    """Writes to p.data, which no version counter shows."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = p.data - 0.1 * p.grad


class Custom:
    """An optimizer that is not derived from torch.optim.Optimizer."""

    def __init__(self, params):
        self.params = list(params)

    @torch.no_grad()
    def step(self):
        for p in self.params:
            if p.grad is not None:
                p -= 0.1 * p.grad

    def zero_grad(self):
        for p in self.params:
            p.grad = None


class CustomData(Custom):
    def step(self):
        for p in self.params:
            if p.grad is not None:
                p.data = p.data - 0.1 * p.grad


class Together:
    """Several optimizers; those of a period step every so often only."""

    def __init__(self, *optimizers, every=1, rare=()):
        self.optimizers, self.every, self.rare, self.count = optimizers, every, rare, 0

    def step(self):
        self.count += 1
        due = self.rare if self.count % self.every == 0 else ()
        for each in (*self.optimizers, *due):
            each.step()

    def zero_grad(self):
        for each in (*self.optimizers, *self.rare):
            each.zero_grad()


class SharpnessAware(torch.optim.Optimizer):
    """As SAM is usually written: a wrapper that shares the groups and calls a base optimizer."""

    def __init__(self, params, base):
        super().__init__(params, {"rho": 0.05})
        self.base = base(self.param_groups, lr=0.1)
        self.param_groups = self.base.param_groups

    def step(self, closure=None):
        self.base.step()


OPTIMIZERS = {
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "fused AdamW at rate 0": lambda p: torch.optim.AdamW(p, lr=0.0, fused=True),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=1e-3, fused=True),
    "foreach SGD": lambda p: torch.optim.SGD(p, lr=1e-3, foreach=True),
    "loop SGD": lambda p: torch.optim.SGD(p, lr=1e-3, foreach=False),
    "rate 0": lambda p: torch.optim.SGD(p, lr=0.0),
    "Adagrad": torch.optim.Adagrad,
    "p.data": Data,
    "SAM": lambda p: SharpnessAware(p, torch.optim.SGD),
    "not torch's": Custom,
}


@pytest.fixture(params=OPTIMIZERS)
def kind(request):
    if "fused" in request.param and torch.__version__ < "2.4":
        pytest.skip("fused on the CPU is newer")
    return OPTIMIZERS[request.param]


def test_forgotten_heads_warn_with_every_optimizer(kind):
    model, loss_func = make()
    (caught,) = run(model, loss_func, kind(list(model.parameters())), steps=20)
    assert "2 of the 2" in str(caught.message)


def test_heads_in_every_optimizer_are_silent(kind):
    model, loss_func = make()
    everything = [*model.parameters(), *loss_func.parameters()]
    assert not run(model, loss_func, kind(everything), steps=20)
    assert loss_func._guard._done


def test_heads_in_an_optimizer_of_their_own_are_silent(kind):
    model, loss_func = make()
    both = Together(torch.optim.SGD(model.parameters(), 0.1), kind(list(loss_func.parameters())))
    assert not run(model, loss_func, both, steps=20)


def test_heads_that_no_torch_optimizer_writes_by_data_are_silent():
    model, loss_func = make()
    both = Together(torch.optim.SGD(model.parameters(), 0.1), CustomData(loss_func.parameters()))
    assert not run(model, loss_func, both, steps=LATE + 10)


@pytest.mark.parametrize("included", [False, True])
def test_lbfgs_with_a_closure(included):
    model, loss_func = make()
    heads = loss_func.parameters() if included else []
    lbfgs = torch.optim.LBFGS([*model.parameters(), *heads], lr=1e-3, max_iter=2)
    x = images()

    def closure():
        lbfgs.zero_grad()
        loss = loss_func(model(x), labels())
        loss.backward()
        return loss

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(9):
            lbfgs.step(closure)
    assert [w.category for w in caught] == [OptimizerWarning] * (not included)


@pytest.mark.skipif(torch.__version__ < "2.4", reason="fused on the CPU is newer")
def test_warm_up_of_fused_heads_at_rate_zero_is_silent():
    model, loss_func = make()
    heads = torch.optim.AdamW(loss_func.parameters(), lr=0.0, fused=True)
    both = Together(torch.optim.SGD(model.parameters(), 0.1), heads)
    assert not run(model, loss_func, both, steps=LATE + 10)


def test_a_model_that_no_optimizer_steps_is_silent():
    model, loss_func = make()
    assert not run(model, loss_func, torch.optim.SGD(loss_func.parameters(), lr=0.1))
    assert loss_func._guard._done


def test_heads_that_wait_with_a_custom_optimizer_of_the_model_are_silent():
    model, loss_func = make()
    heads = torch.optim.SGD(loss_func.parameters(), lr=0.1)
    together = Together(Custom(model.parameters()), every=10, rare=(heads,))
    assert not run(model, loss_func, together, steps=15)


def test_heads_stepped_every_tenth_iteration_are_silent():
    model, loss_func = make()
    heads = torch.optim.SGD(loss_func.parameters(), lr=0.1)
    model_optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    together = Together(model_optimizer, every=10, rare=(heads,))
    assert not run(model, loss_func, together, steps=35)


def test_an_optimizer_of_the_heads_that_never_steps_warns_later():
    model, loss_func = make()
    heads = torch.optim.SGD(loss_func.parameters(), lr=0.1)
    model_optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert not run(model, loss_func, model_optimizer, steps=LATE)
    (caught,) = run(model, loss_func, model_optimizer, steps=1)
    assert "Their optimizer never stepped" in str(caught.message)
    assert heads.param_groups


def test_a_head_in_no_optimizer_is_named_with_one_that_waits():
    model, loss_func = make()
    heads = torch.optim.SGD(loss_func.branches["head_8"].head.parameters(), lr=0.1)
    (caught,) = run(model, loss_func, torch.optim.SGD(model.parameters(), lr=0.1))
    assert "(head_9). They seem to be in no optimizer" in str(caught.message)
    assert heads.param_groups


def test_ten_micro_batches_warn_by_steps_not_by_forwards():
    model, loss_func = make()
    fused = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
    assert not run(model, loss_func, fused, steps=50, accumulate=10)
    assert run(model, loss_func, fused, steps=1, accumulate=10)
    model, loss_func = make()
    both = torch.optim.SGD([*model.parameters(), *loss_func.parameters()], lr=0.1)
    assert not run(model, loss_func, both, steps=90, accumulate=10)


def test_the_steps_of_another_model_do_not_count():
    model, loss_func = make()
    other = nn.Linear(3, 2)
    stranger = torch.optim.Adam(other.parameters())

    class Stranger:
        def step(self):
            other(torch.randn(4, 3)).sum().backward()
            stranger.step()

        zero_grad = stranger.zero_grad

    assert not run(model, loss_func, Stranger(), steps=20)


def test_gradients_are_read_only_in_the_steps_of_their_own_optimizer():
    """Another optimizer may step in another thread, while a backward writes these gradients."""
    read = []

    class Watched(nn.Parameter):
        @property
        def grad(self):
            read.append(self)
            return super().grad

    model, loss_func = make()
    other = nn.Parameter(torch.zeros(1))
    other.grad = torch.ones(1)
    for layer in (model.embedder, *(b.head.hidden for b in loss_func.branches.values())):
        layer.weight = Watched(layer.weight.detach())
    loss_func(model(images()), labels()).backward()
    torch.optim.SGD([other], lr=0.1).step()
    assert not read
    torch.optim.SGD([*model.parameters(), *loss_func.parameters()], lr=0.1).step()
    assert read  # whoever reads them is seen


def test_losses_may_be_made_while_the_watching_ones_are_listed():
    """As another thread may do at any call in between."""

    def make_one(frame=None, *event):
        if frame is None or frame.f_code.co_filename == weakref.__file__:
            guards.append(optimizer.OptimizerGuard())
            guards[-1]._watch()

    guards, sgd = [], torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    make_one(), make_one()
    sys.setprofile(make_one)
    try:
        sgd.step()
    finally:
        sys.setprofile(None)
    assert len(guards) > 2


def test_gan_loop_with_heads_in_the_discriminators_optimizer_is_silent():
    """The generator's step leaves gradients in the heads, which the next step of theirs clears."""
    generator, discriminator = nn.Conv2d(3, 3, 1), Model()
    loss_func = S2SDLoss(
        losses.NTXentLoss(), embedder=discriminator.embedder, head_dims=(8, 9), distill_weight=1.0
    )
    g = torch.optim.Adam(generator.parameters())
    d = torch.optim.Adam([*discriminator.parameters(), *loss_func.parameters()])
    for _ in range(20):
        g.zero_grad()
        loss_func(discriminator(generator(images())), labels()).backward()
        g.step()
        d.zero_grad()
        loss_func(discriminator(generator(images()).detach()), labels()).backward()
        d.step()


def test_two_losses_in_a_process_are_watched_apart():
    good, good_loss = make()
    bad, bad_loss = make()
    together = Together(
        torch.optim.AdamW([*good.parameters(), *good_loss.parameters()], foreach=True),
        torch.optim.AdamW(bad.parameters(), foreach=True),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(12):
            for model, loss_func in ((good, good_loss), (bad, bad_loss)):
                loss_func(model(images()), labels()).backward()
            together.step()
            together.zero_grad()
    assert len(caught) == 1
    assert good_loss._guard._stepped == {"head_8", "head_9"}
    assert not bad_loss._guard._stepped


def test_a_skipped_step_of_the_scaler_is_no_step():
    model, loss_func = make()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(20):  # gradients of inf: the scaler does not call step()
        loss_func(model(images()), labels()).backward()
        sgd.zero_grad()


def test_parameters_replaced_by_to_are_found_again():
    previous = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model, loss_func = make()
        loss_func(model(images()), labels())
        model.double()
        loss_func.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(previous)
    everything = torch.optim.SGD([*model.parameters(), *loss_func.parameters()], lr=0.0)
    for _ in range(20):
        loss_func(model(images(dtype=torch.float64)), labels()).backward()
        everything.step()
        everything.zero_grad()
    assert loss_func._guard._done


def test_a_deleted_loss_leaves_nothing():
    model, loss_func = make()
    sgd = torch.optim.SGD([*model.parameters(), *loss_func.parameters()], lr=0.1)
    run(model, loss_func, sgd, steps=2)
    guard = loss_func._guard
    assert guard in optimizer._watching.values()
    dead = [weakref.ref(o) for o in (model, model.trunk.weight, loss_func, guard, sgd)]
    del model, loss_func, guard, sgd
    gc.collect()
    assert [ref() for ref in dead] == [None] * len(dead)


def test_a_guard_that_is_done_watches_no_more():
    model, loss_func = make()
    sgd = torch.optim.SGD([*model.parameters(), *loss_func.parameters()], lr=0.1)
    run(model, loss_func, sgd, steps=9)
    assert loss_func._guard not in list(optimizer._watching.values())
    assert len(optimizer._hooks) == 2  # before and after each step


def test_a_watched_loss_can_be_pickled_and_copied():
    model, loss_func = make()
    sgd = torch.optim.SGD([*model.parameters(), *loss_func.parameters()], lr=0.1)
    run(model, loss_func, sgd, steps=3)
    for twin in (copy.deepcopy(loss_func), pickle.loads(pickle.dumps(loss_func))):
        assert not twin._guard._start
        assert not twin._guard._leaves


@pytest.mark.parametrize("device_reads", ["aten::_local_scalar_dense"])
def test_nothing_is_read_from_the_device_in_a_good_run(device_reads):
    model, loss_func = make()
    sgd = torch.optim.SGD([*model.parameters(), *loss_func.parameters()], lr=0.1)
    heads = {name: branch.head for name, branch in loss_func.branches.items()}
    with torch.profiler.profile() as profile:
        for _ in range(8):
            embeddings = model(images())
            value = loss_func.loss(embeddings, labels()).detach() * 0 + embeddings.sum()
            value = value + sum(h(torch.ones(2, 12)).sum() for h in heads.values())
            with torch.profiler.record_function("check"):
                loss_func._guard.check(heads, embeddings)
            value.backward()
            sgd.step()
            sgd.zero_grad()
    assert loss_func._guard._done
    checks = [e for e in profile.events() if e.name == "check"]
    reads = [e for e in profile.events() if e.name == device_reads]
    assert len(checks) == 8
    for check in checks:
        span = check.time_range
        assert not any(span.start <= e.time_range.start <= span.end for e in reads)


@pytest.mark.skipif(torch.__version__ < "2.4", reason="torch.compiler.is_compiling is newer")
def test_it_is_inert_and_breaks_no_graph_where_it_is_compiled():
    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.guard = nn.Linear(3, 3), optimizer.OptimizerGuard()

        def forward(self, x):
            self.guard.check({"head": self.head}, x)
            return self.head(x).sum()

    module = Watched()
    torch.compile(module, fullgraph=True, backend="eager")(torch.randn(2, 3)).backward()
    assert not module.guard._heads


@pytest.mark.skipif(torch.__version__ < "2.4", reason="torch.compiler.is_compiling is newer")
@pytest.mark.parametrize("included", [False, True])
def test_a_compiled_step_is_seen(included):
    model, loss_func = make()
    heads = loss_func.parameters() if included else []
    adam = torch.optim.Adam([*model.parameters(), *heads], lr=torch.tensor(1e-3))
    adam_step = torch.compile(adam.step, backend="eager")

    class Compiled:
        def step(self):
            adam_step()

        zero_grad = adam.zero_grad

    assert len(run(model, loss_func, Compiled())) == (not included)


# Gradients that pile up


def piling(model, loss_func, clear, sgd=None, steps=12):
    """As run, with another way to clear gradients before each batch."""
    sgd = sgd or torch.optim.SGD([*model.parameters(), *loss_func.parameters()], lr=0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            clear["before"]()
            loss = loss_func(model(images()), labels())
            clear["after"]()
            loss.backward()
            sgd.step()
    return [str(w.message) for w in caught if w.category is OptimizerWarning]


def nothing():
    pass


@pytest.mark.parametrize("place", ["before", "after"])
def test_model_zero_grad_lets_the_heads_gradients_pile_up(place):
    model, loss_func = make()
    clear = {"before": nothing, "after": nothing, place: model.zero_grad}
    (text,) = piling(model, loss_func, clear)
    assert "pile up" in text
    assert "loss_func.zero_grad()" in text


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("place", ["before", "after"])
def test_cleared_gradients_are_silent(place, in_place):
    model, loss_func = make()
    sgd = torch.optim.SGD([*model.parameters(), *loss_func.parameters()], lr=0.01)

    def clear():
        sgd.zero_grad(set_to_none=not in_place)

    assert not piling(
        model, loss_func, {"before": nothing, "after": nothing, place: clear}, sgd=sgd
    )


def test_gradients_of_heads_set_to_zero_before_the_forward_are_silent():
    model, loss_func = make()

    def clear():
        model.zero_grad()
        loss_func.zero_grad(set_to_none=False)

    assert not piling(model, loss_func, {"before": clear, "after": nothing})


def test_heads_cleared_after_the_forward_and_the_model_before_are_silent():
    model, loss_func = make()
    assert not piling(model, loss_func, {"before": model.zero_grad, "after": loss_func.zero_grad})


def test_gradients_that_nobody_clears_are_silent():
    model, loss_func = make()
    assert not piling(model, loss_func, {"before": nothing, "after": nothing})


# Heads that share a group with proxies


def proxies(model_lr, loss_lr, kinds=(torch.optim.Adam, torch.optim.Adam), loss=None, **kwargs):
    """A second optimizer over all of the loss, as is usual for proxies."""
    model = Model()
    loss = loss or losses.ProxyAnchorLoss(6, 6)
    loss_func = S2SDLoss(loss, embedder=model.embedder, head_dims=(8, 9), **kwargs)
    both = Together(
        kinds[0](model.parameters(), lr=model_lr), kinds[1](loss_func.parameters(), lr=loss_lr)
    )
    return [str(w.message) for w in run(model, loss_func, both)]


def test_a_classifier_optimizer_at_rate_one_warns():
    (text,) = proxies(1e-4, 1.0)
    assert "at lr=1, 10000 times the model's lr=0.0001" in text
    assert "loss_func.param_groups(lr=0.0001, loss_lr=1)" in text
    assert "loss_func.add_to(optimizer, loss_lr=1)" in text


def test_the_usual_higher_rate_of_heads_is_silent():
    assert not proxies(1e-4, 1e-3)
    assert proxies(1e-4, 1e-2)


def test_heads_without_proxies_may_have_any_rate():
    assert not proxies(1e-4, 1.0, loss=losses.NTXentLoss())


def test_a_frozen_head_does_not_pass_for_proxies():
    model, loss_func = make()
    loss_func.branches["head_8"].head.requires_grad_(False)
    first = torch.optim.Adam(model.parameters(), lr=1e-4)
    second = torch.optim.Adam(loss_func.parameters(), lr=1.0)
    assert not run(model, loss_func, Together(first, second))


def test_rates_of_unlike_optimizers_are_not_compared():
    assert not proxies(1e-4, 0.1, kinds=(torch.optim.Adam, torch.optim.SGD))


@pytest.mark.parametrize("advice", ["param_groups", "add_to"])
def test_the_advised_groups_are_silent(advice):
    model = Model()
    loss_func = S2SDLoss(losses.ProxyAnchorLoss(6, 6), embedder=model.embedder, head_dims=(8, 9))
    first = torch.optim.Adam(model.parameters(), lr=1e-4)
    if advice == "add_to":
        loss_func.add_to(first, loss_lr=1.0)
        assert not run(model, loss_func, first)
    else:
        second = torch.optim.Adam(loss_func.param_groups(lr=1e-4, loss_lr=1.0))
        assert not run(model, loss_func, Together(first, second))


def test_a_warm_up_of_the_model_is_compared_by_its_goal():
    model = Model()
    loss_func = S2SDLoss(losses.ProxyAnchorLoss(6, 6), embedder=model.embedder, head_dims=(8, 9))
    first = torch.optim.Adam(model.parameters(), lr=1e-3)
    warm_up = torch.optim.lr_scheduler.LambdaLR(first, lambda step: (step + 1) / 1000)
    both = Together(first, torch.optim.Adam(loss_func.parameters(), lr=1e-3))
    assert not run(model, loss_func, both, schedule=warm_up)


class WithFeatures(Model):
    def forward(self, images):
        features = self.trunk(images).mean(dim=(2, 3))
        return self.embedder(features), features


def fully_sharded_rank(rank):
    from torch.distributed.fsdp import fully_shard

    cases = (False, False), (False, True), (True, False), (True, True), ("rare", True)
    for heads, sharded_loss in cases:
        model = WithFeatures()
        loss_func = S2SDLoss(losses.NTXentLoss(), feature_dim=12, head_dims=(8, 9))
        for module in (model.trunk, model.embedder, model, *([loss_func] if sharded_loss else [])):
            fully_shard(module)
        parameters = [*model.parameters(), *(loss_func.parameters() if heads is True else [])]
        adam = torch.optim.AdamW(parameters, lr=0.0)
        waiting = [torch.optim.AdamW(loss_func.parameters())] if heads == "rare" else []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", OptimizerWarning)
            for step in range(19):
                embeddings, features = model(images())
                loss = loss_func(embeddings, labels(), features=features)
                adam.zero_grad(set_to_none=False)
                loss.backward()
                if step > 9:  # before, shards are gathered ten times over without a step
                    adam.step()
                else:
                    assert loss_func._guard._model_steps == 0
        found = [str(w.message) for w in caught if w.category is OptimizerWarning]
        assert len(found) == (not heads), (heads, sharded_loss, found)
        assert loss_func._guard._done == (not waiting)
    return {}


@pytest.mark.skipif(torch.__version__ < "2.6", reason="fully_shard is newer")
def test_fully_shard_without_heads_warns_and_with_them_is_silent():
    on_ranks(fully_sharded_rank, 2)
