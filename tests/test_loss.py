"""S2SDLoss is the paper's objective; then its state, settings and optimizer groups."""

import copy
import io
import math

import pytest
import torch
from helpers import CPU_FLOAT16, F_DIM, B, D, Model, images, labels, plain_s2sd
from pytorch_metric_learning import distances, losses, miners
from torch import nn

from s2sd_pml import FeatureCapture, ProjectionHead, S2SDLoss
from s2sd_pml.errors import ArgumentError, MissingFeaturesError

DIMS = (5, 9, 16)

LOSS_MINER = {
    "multi_similarity": lambda: (losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner()),
    "margin": lambda: (losses.MarginLoss(learn_beta=True, num_classes=6), None),
    "triplet_semihard": lambda: (
        losses.TripletMarginLoss(),
        miners.TripletMarginMiner(type_of_triplets="semihard"),
    ),
    "ntxent": lambda: (losses.NTXentLoss(), None),
    "contrastive_cosine": lambda: (
        losses.ContrastiveLoss(1, 0, distance=distances.CosineSimilarity()),
        miners.BatchHardMiner(),
    ),
    "proxy_anchor": lambda: (losses.ProxyAnchorLoss(6, D), None),
    "arcface": lambda: (losses.ArcFaceLoss(6, D), miners.PairMarginMiner()),
}


def make(kind="multi_similarity", **kwargs):
    model = Model().double()
    loss, miner = LOSS_MINER[kind]()
    if kwargs.get("pooling", "avg") != "avg":
        where = {"trunk": model.trunk, "feature_dim": F_DIM}
    else:
        where = {"embedder": model.embedder}
    loss_func = S2SDLoss(loss, miner, **{"head_dims": DIMS, **where, **kwargs}).double()
    return model, loss_func


def gradients(scalar, *modules):
    params = [p for m in modules for p in m.parameters()]
    return torch.autograd.grad(scalar, params, allow_unused=True)


@pytest.mark.parametrize("kind", LOSS_MINER)
@pytest.mark.parametrize(
    "kwargs",
    [
        {"head_dims": (16,), "feature_distill_weight": 0},
        {"feature_distill_weight": 0.0, "temperature": 0.2},
        {"feature_distill_delay": 1},
        {"feature_distill_delay": 0, "pooling": "avg+max", "temperature": 4, "exclude_self": True},
        {"feature_distill_delay": 2, "distill_weight": lambda step: 10.0 * step, "chunk_size": 5},
        {
            "head_dims": (),
            "feature_distill_delay": 0,
            "feature_distill_weight": lambda step: 1.0 + step,
        },
    ],
    ids=["dsd", "msd", "msdf", "msdfa", "schedule", "features_only"],
)
def test_value_and_gradients_are_the_equations(kind, kwargs):
    model, loss_func = make(kind, **kwargs)
    for step in range(3):
        x = images(dtype=torch.float64)
        feature_map = model.trunk(x)
        embeddings = model.embedder(feature_map.mean(dim=(2, 3)))
        expected = plain_s2sd(loss_func, embeddings, feature_map, labels(), step)
        got = loss_func(model(x), labels())
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        for a, b in zip(
            gradients(got, model, loss_func), gradients(expected, model, loss_func), strict=True
        ):
            a, b = (torch.zeros(()) if g is None else g for g in (a, b))
            torch.testing.assert_close(a.broadcast_to(b.shape), b, rtol=1e-10, atol=1e-10)
        assert int(loss_func.step) == step + 1


def test_training_moves_every_parameter_and_lowers_the_loss():
    model, loss_func = make(feature_distill_delay=0, distill_weight=5.0, feature_distill_weight=5.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    assert loss_func.add_to(optimizer) is loss_func
    before = [p.detach().clone() for p in [*model.parameters(), *loss_func.parameters()]]
    x, history = images(dtype=torch.float64), []
    x += torch.randn(B // 4, 3, 1, 1, dtype=torch.float64)[labels()]  # classes differ in colour
    for _ in range(60):
        optimizer.zero_grad()
        loss = loss_func(model(x), labels())
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.8 * history[0]
    for old, new in zip(before, [*model.parameters(), *loss_func.parameters()], strict=True):
        assert not torch.equal(old, new)


def test_kl_reaches_the_embedder_and_the_trunk_but_not_the_heads():
    model, loss_func = make(feature_distill_delay=0)
    x = images(dtype=torch.float64)

    def grads(weight):
        loss_func.distill_weight = loss_func.feature_distill_weight = weight
        return gradients(loss_func(model(x), labels()), model, loss_func)

    n = len(list(model.parameters()))
    with_kl, without = grads(50.0), grads(0.0)
    assert all(not torch.equal(a, b) for a, b in zip(with_kl[:n], without[:n], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(with_kl[n:], without[n:], strict=True))


@pytest.mark.parametrize("kind", LOSS_MINER)
@pytest.mark.parametrize("how", ["transparent", "eval"])
def test_is_the_base_loss_bit_for_bit(kind, how):
    torch.manual_seed(3)
    model = Model()
    loss, miner = LOSS_MINER[kind]()
    twin = copy.deepcopy((model, loss, miner))
    kwargs = {} if how == "eval" else {"head_dims": (), "feature_distill_weight": 0}
    loss_func = S2SDLoss(loss, miner, embedder=model.embedder, **kwargs)
    loss_func.train(how != "eval")
    x = images()

    torch.manual_seed(7)
    got = loss_func(model(x), labels())
    got.backward()
    after_got = torch.rand(3)

    model2, loss2, miner2 = twin
    torch.manual_seed(7)
    embeddings = model2(x)
    mined = None if miner2 is None else miner2(embeddings, labels())
    expected = loss2(embeddings, labels(), mined)
    expected.backward()
    assert torch.equal(got, expected)
    assert torch.equal(after_got, torch.rand(3))
    for p, q in zip(
        [*model.parameters(), *loss.parameters()],
        [*model2.parameters(), *loss2.parameters()],
        strict=True,
    ):
        assert torch.equal(p.grad, q.grad)
    assert int(loss_func.step) == (0 if how == "eval" else 1)


def test_eval_needs_no_features_and_does_not_count():
    _, loss_func = make()
    loss_func.eval()
    with torch.no_grad():
        loss_func(torch.randn(B, D), labels())
    assert int(loss_func.step) == 0
    assert loss_func.components["aux"] == 0


def test_no_grad_in_training_mode_with_features_does_not_count():
    model, loss_func = make()
    with torch.no_grad():
        f = model.trunk(images(dtype=torch.float64)).mean(dim=(2, 3))
        value = loss_func(model.embedder(f), labels(), features=f)
    assert torch.isfinite(value)
    assert loss_func.components["aux"] > 0
    assert int(loss_func.step) == 0


def test_variants_by_name():
    model = Model()
    args = (losses.TripletMarginLoss(), None)
    dsd = S2SDLoss.dsd(*args, embedder=model.embedder)
    assert (dsd.head_dims, dsd.feature_distill_weight) == ((2048,), 0)
    msd = S2SDLoss.msd(*args, embedder=model.embedder, distill_weight=3.0)
    assert (msd.head_dims, msd.feature_distill_weight, msd.distill_weight) == (
        (512, 1024, 1536, 2048),
        0,
        3.0,
    )
    msdf = S2SDLoss.msdf(*args, embedder=model.embedder)
    default = S2SDLoss(*args, embedder=model.embedder)
    assert repr(msdf) == repr(default)
    assert (default.distill_weight, default.temperature, default.feature_distill_weight) == (
        50.0,
        1.0,
        50.0,
    )
    assert (default.feature_distill_delay, default.pooling) == (1000, "avg")
    msdfa = S2SDLoss.msdfa(*args, trunk=model.trunk, feature_dim=F_DIM)
    assert msdfa.pooling == "avg+max"
    with pytest.raises(ArgumentError, match="one head"):
        S2SDLoss.dsd(*args, embedder=model.embedder, head_dims=(8, 16))


def test_explicit_features_win_over_captured_ones():
    model, loss_func = make(feature_distill_delay=0)
    x = images(dtype=torch.float64)
    other = torch.randn(B, F_DIM, dtype=torch.float64)
    got = loss_func(model(x), labels(), features=other)
    expected = plain_s2sd(loss_func, model(x), other, labels(), 0)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_a_given_indices_tuple_serves_every_branch_without_a_miner():
    model, loss_func = make()
    loss_func.miner = None
    for branch in loss_func.branches.values():
        branch.miner = None
    x = images(dtype=torch.float64)
    given = miners.BatchHardMiner()(model(x), labels())
    got = loss_func(model(x), labels(), given)
    expected = plain_s2sd(loss_func, model(x), model.trunk(x), labels(), 0, given)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert not torch.isclose(got, loss_func(model(x), labels()))


def test_a_given_indices_tuple_serves_only_the_base_branch_with_a_miner():
    model, loss_func = make()
    x = images(dtype=torch.float64)
    given = miners.BatchHardMiner()(model(x), labels())
    got = loss_func(model(x), labels(), given)
    expected = plain_s2sd(loss_func, model(x), model.trunk(x), labels(), 0, given)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_branches_share_nothing():
    _, loss_func = make("arcface")
    parts = [loss_func, *loss_func.branches.values()]
    for name in ("loss", "miner"):
        assert len({id(getattr(p, name)) for p in parts}) == len(parts)
    assert [b.loss.W.shape[0] for b in loss_func.branches.values()] == list(DIMS)


def test_components_add_up_and_keep_their_keys():
    model, loss_func = make(feature_distill_delay=1, distill_weight=7.0, feature_distill_weight=3.0)
    keys = None
    for step in range(3):
        loss = loss_func(model(images(dtype=torch.float64)), labels())
        c = loss_func.components
        total = (c["base"] + c["aux"]) / 2 + 7 * c["distill"] + 3 * c["feature_distill"]
        torch.testing.assert_close(loss.detach(), total)
        assert (c["feature_distill"] > 0) == (step >= 1)
        assert not any(v.requires_grad for v in c.values())
        keys = keys or list(c)
        assert list(c) == keys
    for kind in ("aux", "distill"):
        per_head = torch.stack([c[f"{kind}_{d}"] for d in DIMS])
        torch.testing.assert_close(per_head.mean(), c[kind])
    loss_func.eval()
    loss_func(model(images(dtype=torch.float64)), labels())
    assert list(loss_func.components) == keys


def test_records_for_loggers(monkeypatch):
    monkeypatch.setattr("pytorch_metric_learning.utils.common_functions.COLLECT_STATS", True)
    model, loss_func = make(feature_distill_delay=0)
    loss_func(model(images(dtype=torch.float64)), labels())
    assert loss_func.base_loss == loss_func.components["base"].item()
    assert loss_func.feature_distill_loss > 0
    assert set(loss_func._record_these_stats) >= {"aux_loss", "distill_loss"}


def test_project_gives_each_teacher_normalised():
    model, loss_func = make()
    with torch.no_grad():
        f = model.trunk(images(dtype=torch.float64)).mean(dim=(2, 3))
        teachers = loss_func.project(f)
    assert list(teachers) == list(DIMS)
    for d, z in teachers.items():
        assert z.shape == (B, d)
        torch.testing.assert_close(z.norm(dim=1), torch.ones(B, dtype=torch.float64))
        head = loss_func.branches[f"head_{d}"].head
        torch.testing.assert_close(z, nn.functional.normalize(head(f), dim=1))


def test_param_groups_cover_every_parameter_once():
    _, loss_func = make("proxy_anchor")
    heads, others = loss_func.param_groups(0.1, weight_decay=0.2, loss_lr=0.3)
    assert (heads["lr"], heads["weight_decay"]) == (0.1, 0.2)
    assert (others["lr"], others["weight_decay"]) == (0.3, 0.0)
    assert {id(p) for p in others["params"]} >= {id(loss_func.loss.proxies)}
    ids = [id(p) for g in (heads, others) for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in loss_func.parameters())
    assert len(make()[1].param_groups(0.1)) == 1  # no loss parameters, no empty group


def test_add_to_uses_the_optimizers_rate_and_skips_what_it_holds():
    model, loss_func = make("proxy_anchor")
    optimizer = torch.optim.AdamW([*model.parameters(), loss_func.loss.proxies], lr=0.5)
    loss_func.add_to(optimizer, betas=(0.8, 0.9))
    held = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for m in (model, loss_func) for p in m.parameters())
    heads = optimizer.param_groups[1]
    assert (heads["lr"], heads["weight_decay"], heads["betas"]) == (0.5, 0.0, (0.8, 0.9))
    loss_func.add_to(optimizer)
    assert len(optimizer.param_groups) == 3


@pytest.mark.parametrize(
    ("rates", "own", "expected"),
    [
        ((1e-5,), 1e-3, 1e-5),  # what the group has counts, not what it did not take
        ((1e-5, 1e-5), 1e-3, 1e-5),
        ((1e-5, 1e-4), 1e-4, 1e-4),
        ((1e-5, 1e-4), 1e-3, None),
    ],
)
def test_the_heads_rate_is_one_that_the_model_is_trained_at(rates, own, expected):
    model, loss_func = make()
    parts = list(model.parameters())
    groups = [{"params": parts[k :: len(rates)], "lr": lr} for k, lr in enumerate(rates)]
    optimizer = torch.optim.Adam(groups, lr=own)
    if expected is None:
        with pytest.raises(ArgumentError, match=r"\[1e-05, 0.0001\].*own lr=0.001"):
            loss_func.add_to(optimizer)
        assert len(optimizer.param_groups) == len(rates)
        loss_func.add_to(optimizer, lr=1.0)
        expected = 1.0
    else:
        loss_func.add_to(optimizer)
    assert optimizer.param_groups[-1]["lr"] == expected


def test_add_to_asks_for_no_rate_that_it_does_not_need():
    model, loss_func = make("proxy_anchor")
    groups = [{"params": model.parameters(), "lr": 1e-5}, {"params": loss_func.loss.parameters()}]
    optimizer = torch.optim.Adam(groups, lr=1e-2)
    loss_func.add_to(optimizer)  # the proxies' rate is not that of a model
    assert [g["lr"] for g in optimizer.param_groups] == [1e-5, 1e-2, 1e-5, 1e-2]
    optimizer.param_groups[0]["lr"] = 0.5
    loss_func.add_to(optimizer)  # once more, as in a notebook
    assert len(optimizer.param_groups) == 4
    model, baseline = make(head_dims=(), feature_distill_weight=0)
    parts = list(model.parameters())
    several = torch.optim.SGD([{"params": [p], "lr": k + 1} for k, p in enumerate(parts)], lr=0.5)
    baseline.add_to(several)
    assert len(several.param_groups) == len(parts)


def test_add_to_an_optimizer_that_chooses_its_own_rate():
    class Own(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": None, "scale": True})

    model, loss_func = make()
    optimizer = Own(model.parameters())
    loss_func.add_to(optimizer, scale=False)
    assert [g["lr"] for g in optimizer.param_groups] == [None, None]
    assert not optimizer.param_groups[1]["scale"]


def test_add_to_an_optimizer_around_another_that_has_no_defaults():
    class Around(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner, self.param_groups = inner, inner.param_groups

        def add_param_group(self, group):
            self.inner.add_param_group(group)

    model, loss_func = make()
    optimizer = Around(torch.optim.SGD(model.parameters(), lr=0.2))
    loss_func.add_to(optimizer, momentum=0.9)
    assert [(g["lr"], g["momentum"]) for g in optimizer.param_groups] == [(0.2, 0), (0.2, 0.9)]


def test_the_branches_proxies_train_at_the_rate_of_those_of_the_base_loss():
    model, loss_func = make("proxy_anchor")
    groups = [{"params": model.parameters()}, {"params": loss_func.loss.parameters(), "lr": 1.0}]
    optimizer = torch.optim.Adam(groups, lr=1e-3)
    loss_func.add_to(optimizer)
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3, 1.0, 1e-3, 1.0]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lr_loss": 0.1}, ArgumentError, "no option lr_loss.* loss_lr.*betas"),
        ({"momentum": 0.9, "wd": 1}, ArgumentError, "Adam has no option momentum, wd"),
        ({"lr": -1.0}, ArgumentError, "lr=-1.0"),
        ({"loss_lr": float("nan")}, ArgumentError, "loss_lr=nan"),
        ({"weight_decay": -0.5}, ArgumentError, "weight_decay=-0.5"),
    ],
)
def test_add_to_refuses_what_the_optimizer_would_not_heed(options, error, words):
    model, loss_func = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with pytest.raises(error, match=words):
        loss_func.add_to(optimizer, **options)
    assert len(optimizer.param_groups) == 1
    loss_func.add_to(optimizer, name="heads")  # as loggers of learning rates read it


def test_add_to_wants_an_optimizer():
    with pytest.raises(ArgumentError, match="not list"):
        make()[1].add_to([1])


def test_add_to_after_the_scheduler_is_refused():
    model, loss_func = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(ArgumentError, match="before you build the scheduler"):
        loss_func.add_to(optimizer)


def test_the_model_is_no_part_of_the_loss():
    model, loss_func = make()
    own = {id(p) for p in loss_func.parameters()}
    assert own.isdisjoint(id(p) for p in model.parameters())
    assert {k.split(".")[0] for k in loss_func.state_dict()} == {"branches", "counter"}
    expected = sum(p.numel() for d in DIMS for p in ProjectionHead(F_DIM, d).parameters())
    assert sum(p.numel() for p in loss_func.parameters()) == expected


def test_state_dict_carries_heads_proxies_and_step_through_a_safe_file():
    model, loss_func = make("arcface")
    for _ in range(3):
        loss_func(model(images(dtype=torch.float64)), labels())
    file = io.BytesIO()
    torch.save(loss_func.state_dict(), file)
    file.seek(0)
    _, fresh = make("arcface")
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert int(fresh.step) == 3
    for p, q in zip(loss_func.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, q)
    x = images(dtype=torch.float64)
    f = model.trunk(x).mean(dim=(2, 3))
    a = loss_func(model(x), labels(), features=f)
    assert torch.equal(a, fresh(model(x), labels(), features=f))


def test_a_deep_copied_loss_still_finds_the_features_and_is_independent():
    model, loss_func = make()
    twin = copy.deepcopy(loss_func)
    x = images(dtype=torch.float64)
    embeddings = model(x)
    assert torch.equal(loss_func(embeddings, labels()), twin(embeddings, labels()))
    assert {id(p) for p in twin.parameters()}.isdisjoint(id(p) for p in loss_func.parameters())


def test_model_and_loss_deep_copied_together_work_together():
    model, loss_func = make()
    model2, loss2 = copy.deepcopy((model, loss_func))
    x = images(dtype=torch.float64)
    assert torch.equal(loss_func(model(x), labels()), loss2(model2(x), labels()))


def test_a_pickled_loss_leaves_the_model_behind_and_says_how_to_go_on():
    model, loss_func = make()
    file = io.BytesIO()
    torch.save(loss_func, file)
    heads_only = io.BytesIO()
    torch.save(loss_func.state_dict(), heads_only)
    assert len(file.getvalue()) < len(heads_only.getvalue()) + 60_000
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = images(dtype=torch.float64)
    with pytest.raises(MissingFeaturesError, match="loss_func.capture = "):
        loaded(model(x), labels())
    loaded.capture = FeatureCapture(model.embedder)
    assert torch.equal(loaded(model(x), labels()), loss_func(model(x), labels()))


def test_a_factory_makes_every_loss():
    made = []

    class Custom(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.proxies = nn.Parameter(torch.randn(6, dim))
            made.append(dim)

        def forward(self, embeddings, labels):
            return nn.functional.cross_entropy(embeddings @ self.proxies.T, labels)

    model = Model()
    loss_func = S2SDLoss(lambda dim: Custom(dim), embedder=model.embedder, head_dims=(4, 8))
    assert made == [D, 4, 8]
    loss_func(model(images()), labels()).backward()
    assert all(p.grad is not None for p in loss_func.parameters())


def test_custom_head_and_pooling():
    model = Model()
    loss_func = S2SDLoss(
        losses.NTXentLoss(),
        trunk=model.trunk,
        feature_dim=F_DIM * 16,
        head=lambda i, o: nn.Linear(i, o, bias=False),
        head_dims=(7,),
        pooling=lambda feature_map: feature_map.flatten(1),
        feature_distill_delay=0,
    )
    loss_func(model(images()), labels()).backward()
    assert loss_func.branches["head_7"].head.weight.grad.shape == (7, F_DIM * 16)


def test_settings_can_change_between_steps():
    model, loss_func = make()
    x = images(dtype=torch.float64)
    first = loss_func(model(x), labels())
    loss_func.distill_weight = 0.0
    second = loss_func(model(x), labels())
    c = loss_func.components
    torch.testing.assert_close(first - second, 50 * c["distill"])


def test_a_schedule_gone_wrong_is_named_with_its_step():
    model, loss_func = make(distill_weight=lambda step: math.inf if step else 1.0)
    loss_func(model(images(dtype=torch.float64)), labels())
    with pytest.raises(ArgumentError, match="distill_weight=inf at step 1"):
        loss_func(model(images(dtype=torch.float64)), labels())
    assert int(loss_func.step) == 1


def test_reference_embeddings_with_their_features():
    model = Model().double()
    loss_func = S2SDLoss(
        losses.ContrastiveLoss(), embedder=model.embedder, head_dims=(9,), distill_weight=0.0
    ).double()
    x, ref = images(dtype=torch.float64), images(8, dtype=torch.float64)
    ref_labels = labels(8)
    got = loss_func(model(x), labels(), ref_emb=model(ref), ref_labels=ref_labels)
    branch = loss_func.branches["head_9"]
    f, f_ref = (model.trunk(i).mean(dim=(2, 3)) for i in (x, ref))
    z, z_ref = branch.head(f), branch.head(f_ref)
    expected = 0.5 * (
        loss_func.loss(model(x), labels(), ref_emb=model(ref), ref_labels=ref_labels)
        + branch.loss(z, labels(), ref_emb=z_ref, ref_labels=ref_labels)
    )
    torch.testing.assert_close(got, expected)
    with pytest.raises(MissingFeaturesError):
        loss_func(model(x), labels(), ref_emb=model(ref).detach(), ref_labels=ref_labels)
    loss_func(
        model(x), labels(), ref_emb=model(ref).detach(), ref_labels=ref_labels, ref_features=f_ref
    )


@pytest.mark.parametrize("kind", ["arcface", "contrastive_cosine"])
def test_embeddings_as_their_own_references_are_no_references(kind):
    model, loss_func = make(kind)
    embeddings = model(images(dtype=torch.float64))
    plain = loss_func(embeddings, labels())
    y = labels()
    assert torch.equal(loss_func(embeddings, y, ref_emb=embeddings, ref_labels=y), plain)


def test_self_supervised_loss_is_called_as_before():
    model = Model()
    loss_func = S2SDLoss(
        losses.SelfSupervisedLoss(losses.NTXentLoss()), embedder=model.embedder, head_dims=(9,)
    )
    x, view = images(), images()
    positional = loss_func(model(x), model(view))
    by_name = loss_func(model(x), ref_emb=model(view))
    assert torch.equal(positional, by_name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, CPU_FLOAT16])
def test_branch_losses_run_in_float32_under_autocast(dtype):
    model = Model()
    seen = []

    class Spy(losses.ProxyAnchorLoss):
        def forward(self, embeddings, *args, **kwargs):
            seen.append((embeddings.dtype, (embeddings @ embeddings.T).dtype))
            return super().forward(embeddings, *args, **kwargs)

    loss_func = S2SDLoss(
        Spy(6, D), embedder=model.embedder, head_dims=(9,), feature_distill_delay=0
    )
    with torch.autocast("cpu", dtype=dtype):
        loss = loss_func(model(images()), labels())
    loss.backward()
    assert seen == [(torch.float32, torch.float32)] * 2
    assert {p.dtype for p in loss_func.parameters()} == {torch.float32}
    assert loss.dtype == torch.float32


def test_heads_follow_the_features_to_their_device():
    _, loss_func = make()
    features = torch.randn(B, F_DIM, dtype=torch.float64, device="meta")
    assert {z.device.type for z in loss_func.project(features).values()} == {"meta"}
