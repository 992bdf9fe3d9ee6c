"""Embedders fitted anew to frozen features, by base loss and KL, and their place in a run."""

from __future__ import annotations

import csv

import pytest
import torch
import torch.nn.functional as F
from test_examples import SMALL
from test_trainer import parsed

import export  # isort: skip
import refit  # isort: skip
import train  # isort: skip

from s2sd_pml.functional import relation_kl


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
    loss_func, miner = train.pml_loss(args, 16)

    def found(**kinds):
        embeddings = refit.fit(args, frozen, 6, **kinds)(features)
        kl, _ = relation_kl(embeddings, [teacher], weights=[1.0], temperature=0.2)
        return kl.item(), loss_func(embeddings, labels, miner(embeddings, labels)).item()

    start = found(steps=0)
    copied = found(steps=60, base=False, weight=1.0)
    based, both = found(steps=60), found(steps=60, weight=10.0)
    assert copied[0] < 0.9 * start[0]
    assert based[1] < 0.9 * start[1]
    assert copied[0] < both[0] < based[0]


def test_a_run_tests_and_exports_the_new_embedder(tmp_path, capsys):
    def scores(folder, *flags):
        train.main([*SMALL, "--no-report", "--output", str(tmp_path / folder), *flags])
        with open(tmp_path / folder / "metrics.csv", newline="") as file:
            found = [r for r in csv.DictReader(file) if r["metric"] in ("Recall@1", "MAP@R")]
        return {(r["run"], r["metric"]): r["value"] for r in found}  # the last of each

    model = tmp_path / "model.pt"
    plain = scores("plain")
    with_kl = scores("kl", "--refit", "20", "--export", str(model))
    assert "its embedder fitted anew" in capsys.readouterr().out
    assert {run for run, _ in with_kl} == {run for run, _ in plain} | {"base, refit", "S2SD, refit"}
    assert all(with_kl[key] == value for key, value in plain.items())  # the run is the same
    for run in ("base", "S2SD"):
        assert with_kl[f"{run}, refit", "MAP@R"] != with_kl[run, "MAP@R"]
    without = scores("no-kl", "--refit", "20", "--refit-weight", "0")
    assert without["base, refit", "MAP@R"] == with_kl["base, refit", "MAP@R"]
    assert without["S2SD, refit", "MAP@R"] != with_kl["S2SD, refit", "MAP@R"]

    args = parsed(*SMALL, "--refit", 20)
    split, _ = train.prepare(args)
    exported = export.load(model)
    images = split.test[list(range(len(split.test))), None][0]
    with torch.no_grad():
        recall = train.recall_at_k(exported(images), split.test.labels, ks=(1,))["Recall@1"]
    assert recall == pytest.approx(float(with_kl["S2SD, refit", "Recall@1"]), abs=5e-3)
    assert recall > float(with_kl["S2SD", "Recall@1"]) + 0.01


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--refit", "5", "--nested", "8"], "--refit fits by the base loss and heads"),
        (["--refit", "5", "--teacher", __file__], "--refit fits by the base loss and heads"),
        (["--refit-weight", "5"], "--refit-weight is for the S2SD run with --refit"),
        (["--refit", "5", "--refit-weight", "5", "--baseline-only"], "for the S2SD run"),
    ],
)
def test_a_refit_that_cannot_be(flags, why, capsys):
    with pytest.raises(SystemExit):
        train.main([*SMALL, *flags])
    assert why in capsys.readouterr().err
