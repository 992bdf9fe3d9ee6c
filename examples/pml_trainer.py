"""MetricLossOnly of PML with its tester. The lines marked S2SD are new.

pip install s2sd-pml && python pml_trainer.py
"""

import torch
from pytorch_metric_learning import losses, miners, testers, trainers
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils.accuracy_calculator import (
    AccuracyCalculator,
)
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from s2sd_pml import S2SDLoss  # S2SD

# Your data here. Train on the digits 0 to 4, test on 5 to 9.
digits = load_digits()
images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
seen, unseen = labels < 5, labels >= 5
data = TensorDataset(images[seen], labels[seen])
sampler = MPerClassSampler(labels[seen], m=20, length_before_new_iter=900)

torch.manual_seed(0)
trunk = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(32, 128, 3, stride=2, padding=1),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
)
models = {"trunk": trunk, "embedder": nn.Linear(128, 8)}
# was: loss_func = losses.MultiSimilarityLoss()
loss_func = S2SDLoss(  # S2SD
    losses.MultiSimilarityLoss(),
    miners.MultiSimilarityMiner(),  # S2SD: here, not in mining_funcs
    embedder=models["embedder"],  # S2SD: its input is the features
    **S2SDLoss.recipe("from-scratch"),  # S2SD: not if pretrained
)
optimizers = {
    f"{name}_optimizer": torch.optim.Adam(module.parameters(), lr=1e-3)
    for name, module in models.items()
}
optimizers["metric_loss_optimizer"] = torch.optim.Adam(  # S2SD
    loss_func.parameters(), lr=1e-3
)

tester = testers.GlobalEmbeddingSpaceTester(
    dataloader_num_workers=0,
    accuracy_calculator=AccuracyCalculator(
        include=("precision_at_1",),
        k=1,
        knn_func=CustomKNN(CosineSimilarity()),
    ),
)
tested = {"unseen": TensorDataset(images[unseen], labels[unseen])}


def test(trainer):
    """At the end of every epoch."""
    found = tester.test(tested, trainer.epoch, trunk, models["embedder"])
    recall = found["unseen"]["precision_at_1_level0"]
    print(f"Recall@1 on unseen classes: {100 * recall:.1f}%")


trainer = trainers.MetricLossOnly(
    models,
    optimizers,
    batch_size=100,
    loss_funcs={"metric_loss": loss_func},
    dataset=data,
    sampler=sampler,
    dataloader_num_workers=0,
    end_of_epoch_hook=test,
)
trainer.train(num_epochs=20)
