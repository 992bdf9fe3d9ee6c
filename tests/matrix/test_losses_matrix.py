"""Every loss of pytorch-metric-learning in every way that it can be trained inside S2SDLoss.

In float32 each is trained by ``tests/test_pml_losses.py``.
"""

import pytest
import torch
from pml import LOSSES, TAKE_PAIRS, TAKE_REFERENCES, USUAL_MINER, make_loss, make_miner
from pml_training import stats, train
from pytorch_metric_learning.utils import common_functions as c_f

pytestmark = pytest.mark.matrix


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("how", ["float64", "bfloat16_autocast", "collect_stats"])
def test_every_loss_trains(name, how, monkeypatch):
    monkeypatch.setattr(c_f, "COLLECT_STATS", how == "collect_stats")
    dtype = torch.float64 if how == "float64" else torch.float32
    loss_func = train(make_loss(name), dtype=dtype, autocast=how == "bfloat16_autocast")
    kept = dict(stats(loss_func))
    assert (kept.get(".base_loss") == loss_func.components["base"]) == (how == "collect_stats")


@pytest.mark.parametrize("name", TAKE_PAIRS)
@pytest.mark.parametrize("how", ["its usual miner", "pairs from outside", "both"])
def test_every_loss_that_takes_pairs_trains_with_mined_ones(name, how):
    miner = make_miner(USUAL_MINER.get(name, "MultiSimilarityMiner"))
    train(
        make_loss(name),
        None if how == "pairs from outside" else miner,
        given=how != "its usual miner",
    )


@pytest.mark.parametrize("name", TAKE_REFERENCES)
@pytest.mark.parametrize("features", ["explicit", "captured"])
def test_every_loss_that_compares_with_ref_emb_trains(name, features):
    train(make_loss(name), ref=features)
    if name in TAKE_PAIRS:
        train(make_loss(name), make_miner("MultiSimilarityMiner"), ref=features)
