"""The diagnosis: terms that add up to the objective, and leave the loss as it was."""

from __future__ import annotations

import csv

import pytest
import torch
from helpers import Model, images, labels
from pytorch_metric_learning import losses
from study import diagnose
from test_examples import SMALL

from s2sd_pml import S2SDLoss


def test_the_terms_add_up_and_the_loss_is_left_as_it_was():
    torch.manual_seed(0)
    model = Model()
    loss_func = S2SDLoss(
        losses.NTXentLoss(),
        embedder=model.embedder,
        head_dims=(8, 9),
        distill_weight=3,
        feature_distill_weight=2,
        feature_distill_delay=5,
    )
    features = model.trunk(images(12)).mean(dim=(2, 3))
    embeddings = model.embedder(features)
    found = diagnose.terms(loss_func, embeddings, labels(12, 2), features)
    assert (loss_func.distill_weight, loss_func.feature_distill_weight) == (3, 2)
    assert loss_func.feature_distill_delay == 5
    assert loss_func.step == 0
    assert loss_func.training
    loss_func.feature_distill_delay = 0
    whole = loss_func(embeddings, labels(12, 2), features=features)
    assert sum(found.values()).item() == pytest.approx(whole.item())
    for module in (model.trunk, model.embedder):
        parameters = list(module.parameters())
        parts = [diagnose.gradient(loss, parameters) for loss in found.values()]
        expected = diagnose.gradient(whole, parameters)
        torch.testing.assert_close(sum(parts), expected, rtol=1e-3, atol=1e-6)
    c = loss_func.components
    assert found["aux"].item() == pytest.approx(c["aux"].item() / 2, rel=1e-4)
    assert found["distill"].item() == pytest.approx(3 * c["distill"].item(), rel=1e-3)
    embedder = list(model.embedder.parameters())
    assert diagnose.gradient(found["aux"], embedder).abs().max() < 1e-6


def test_agreement_is_a_correlation_of_similarities():
    x = torch.randn(50, 6)
    turned = x @ torch.linalg.qr(torch.randn(6, 6))[0] * 3
    assert diagnose.agreement(x, turned) == pytest.approx(1, abs=1e-4)
    assert abs(diagnose.agreement(x, torch.randn(50, 6))) < 0.2


def test_it_writes_a_row_an_epoch_and_a_picture(tmp_path, capsys):
    flags = ["--quiet", "--epochs", "2", "--feature-distill-delay", "0", "--output", str(tmp_path)]
    diagnose.main([*SMALL, *flags])
    with open(tmp_path / "diagnosis.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["3", "6"]
    for part in ("trunk", "embedder"):
        assert all(float(row[f"feature_distill on {part}"]) > 0 for row in rows)
    assert "agreement with head 24" in capsys.readouterr().out
    assert (tmp_path / "diagnosis.png").read_bytes().startswith(b"\x89PNG")


def test_another_objective_is_not_taken_apart():
    with pytest.raises(SystemExit, match="--reach teachers: what is taken apart"):
        diagnose.main([*SMALL, "--reach", "teachers"])
