"""Refitted embedders of frozen features, by base loss and KL, and their place in a run."""

from __future__ import annotations

import csv

import pytest
import torch
import torch.nn.functional as F
import train
from test_examples import SMALL
from test_trainer import parsed
from trainer import by_name, export, objectives, ranks, refit, stop, training
from trainer.images import Batches
from trainer.report import REFIT
from trees import inshop

from s2sd_pml.functional import relation_kl, relation_kl_reference


def test_the_cosine_of_joined_heads_is_their_mean():
    heads = {f"head {d}": F.normalize(torch.randn(6, d), dim=1) for d in (4, 9)}
    joined = F.normalize(refit.heads_of({"features": torch.ones(6, 3), **heads}), dim=1)
    mean = sum(z @ z.T for z in heads.values()) / 2
    torch.testing.assert_close(joined @ joined.T, mean)


def test_what_is_fitted_falls():
    torch.manual_seed(0)
    labels = torch.arange(64) // 4
    features = torch.randn(64, 12) + 2 * torch.randn(16, 12)[labels]
    teacher = F.normalize(torch.randn(16, 20)[labels] + 0.5 * torch.randn(64, 20), dim=1)
    frozen = refit.freeze({"features": features, "head 20": teacher}, labels)
    args = parsed("--batch-size", 32, "--per-class", 4, "--temperature", 0.2, "--exclude-self")
    loss_func, miner = by_name.pml_loss(args, 16)

    def found(**kinds):
        embeddings = refit.fit(args, frozen, 6, **kinds)(features)
        kl = relation_kl(embeddings, [teacher], temperature=0.2)
        return kl.item(), loss_func(embeddings, labels, miner(embeddings, labels)).item()

    start = found(steps=0)
    copied = found(steps=60, base=False, distill_weight=1.0)
    based, both = found(steps=60), found(steps=60, distill_weight=10.0)
    assert copied[0] < 0.9 * start[0]
    assert based[1] < 0.9 * start[1]
    assert copied[0] < both[0] < based[0]


def test_its_steps_are_those_of_adam_on_the_whole_objective(monkeypatch):
    torch.manual_seed(0)
    labels = torch.arange(24) // 3
    features, teacher = torch.randn(24, 10), F.normalize(torch.randn(24, 7), dim=1)
    frozen = refit.freeze({"features": features, "head 7": teacher}, labels)
    args = parsed("--batch-size", 12, "--per-class", 3, "--temperature", 0.2, "--exclude-self")
    embedder = refit.fit(args, frozen, 4, steps=0)
    centred = features - features.mean(dim=0)
    torch.testing.assert_close(embedder(features), centred @ frozen.principal[1][:, :4])

    loss_func, miner = by_name.pml_loss(args, 8)
    optimizer = torch.optim.Adam(embedder.parameters())
    batches = Batches(labels, 12, 3, 2, args.seed)
    for (rows, _), lr in zip(batches, (refit.LR, refit.LR / 2), strict=True):  # half a cosine
        z, y = embedder(features[rows]), labels[rows]
        settings = {"temperature": 0.2, "exclude_self": True}
        kl = 3.0 * relation_kl_reference(z, [teacher[rows]], **settings)[0]
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        (loss_func(z, y, miner(z, y)) + kl).backward()
        optimizer.step()
    fitted = refit.fit(args, frozen, 4, steps=2, distill_weight=3.0)
    torch.testing.assert_close(fitted.weight, embedder.weight)
    torch.testing.assert_close(fitted.bias, embedder.bias)

    monkeypatch.setattr(ranks, "world", lambda: 2)  # one rank fits, to whole batches
    again = refit.fit(args, frozen, 4, steps=2, distill_weight=3.0)
    assert torch.equal(again.weight, fitted.weight)


def test_it_is_fitted_to_training_images_and_to_the_chosen_epoch(tmp_path, monkeypatch):
    """With a gallery, an average and a chosen epoch: the best is held at the start of training."""
    seen = []

    def watched(args, frozen, *rest, **kinds):
        seen.append(frozen)
        return refit_fit(args, frozen, *rest, **kinds)

    refit_fit = refit.fit
    monkeypatch.setattr(refit, "fit", watched)
    flags = "--dataset inshop --image-size 16 --batch-size 4 --per-class 2 --dims 24 32 --refit 3"
    flags += " --epochs 1 --steps-per-epoch 2 --choose-epoch --validation-share 0.5 --ema 0.5"
    folders = ["--root", inshop(tmp_path), "--output", tmp_path / "out"]
    args = parsed(*flags.split(), "--quiet", *folders)
    split, held_out = training.prepare(args)
    trainer = training.Trainer("S2SD", objectives.s2sd_loss, args, split, held_out, {}, None)
    trainer.best.update(2.0, 1)
    run = trainer.train(stop.Request())
    (frozen,) = seen
    assert torch.equal(frozen.labels, split.train.labels)
    spaces = run.project(split.train)  # of the start: an average, and what it was the average of
    assert torch.equal(spaces["features"], frozen.features)
    assert torch.equal(refit.heads_of(spaces), frozen.teacher)
    weights = run.model.trunk.state_dict(), run.trained.trunk.state_dict()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for tested in (run.spaces["test"], run.spaces["gallery"]):
        assert torch.equal(tested[REFIT], run.refitted(tested["features"]))
        assert not torch.equal(tested[REFIT], tested["embeddings"])
    assert "S2SD, refitted embedder" in run.scores
    assert run.rows()[-1][-1] == pytest.approx(run.seconds + run.refit_seconds, abs=1e-3)


def test_its_configuration_repeats_it(tmp_path):
    def scores(folder):
        with open(folder / "metrics.csv", newline="") as file:
            return [(r["run"], r["metric"], r["value"]) for r in csv.DictReader(file)]

    flags = ["--baseline-only", "--refit", "3", "--no-report"]
    train.main([*SMALL, *flags, "--output", str(tmp_path / "first")])
    first = scores(tmp_path / "first")
    assert ("base, refitted embedder", "MAP@R") in {row[:2] for row in first}
    again = ["--no-report", "--output", str(tmp_path / "again")]
    train.main(["--config", str(tmp_path / "first" / "config.json"), *again])
    assert scores(tmp_path / "again") == first


@pytest.mark.slow
def test_a_run_tests_and_exports_the_new_embedder(tmp_path, capsys):
    def scores(folder, *flags):
        train.main([*SMALL, "--no-report", "--output", str(tmp_path / folder), *flags])
        with open(tmp_path / folder / "metrics.csv", newline="") as file:
            found = [r for r in csv.DictReader(file) if r["metric"] in ("Recall@1", "MAP@R")]
        return {(r["run"], r["metric"]): r["value"] for r in found}  # the last of each

    model = tmp_path / "model.pt"
    plain = scores("plain")
    with_kl = scores("kl", "--refit", "20", "--export", str(model))
    assert "with the refitted embedder" in capsys.readouterr().out
    assert {run for run, _ in with_kl} == {run for run, _ in plain} | {
        "base, refitted embedder",
        "S2SD, refitted embedder",
    }
    assert all(with_kl[key] == value for key, value in plain.items())  # the run is the same
    for run in ("base", "S2SD"):
        assert with_kl[f"{run}, refitted embedder", "MAP@R"] != with_kl[run, "MAP@R"]
    without = scores("no-kl", "--refit", "20", "--refit-weight", "0")
    assert (
        without["base, refitted embedder", "MAP@R"] == with_kl["base, refitted embedder", "MAP@R"]
    )
    assert (
        without["S2SD, refitted embedder", "MAP@R"] != with_kl["S2SD, refitted embedder", "MAP@R"]
    )

    args = parsed(*SMALL, "--refit", 20)
    split, _ = training.prepare(args)
    exported = export.load(model)
    images = split.test[list(range(len(split.test))), None][0]
    with torch.no_grad():
        recall = training.recall_at_k(exported(images), split.test.labels, ks=(1,))["Recall@1"]
    assert recall == pytest.approx(float(with_kl["S2SD, refitted embedder", "Recall@1"]), abs=5e-3)
    assert recall > float(with_kl["S2SD", "Recall@1"]) + 0.01


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--refit", "5", "--matryoshka-dims", "8"], "--refit fits one size"),
        (["--refit-weight", "5"], "--refit-weight is for --refit"),
    ],
)
def test_a_refit_that_cannot_be(flags, why, capsys):
    with pytest.raises(SystemExit):
        train.main([*SMALL, *flags])
    assert why in capsys.readouterr().err
