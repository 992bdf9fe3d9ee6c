"""Search trained models with faiss: Recall@1, latency and index size by
embedding size. The lines marked S2SD are new.

pip install s2sd-pml faiss-cpu && python faiss_search.py
"""

import time

import faiss
import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.samplers import MPerClassSampler
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from s2sd_pml import S2SDLoss  # S2SD

# Your data here. Train on the digits 0 to 4, test on 5 to 9.
digits = load_digits()
images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
seen, unseen = labels < 5, labels >= 5


def train(size):
    """A model with embeddings (B, size)."""
    data = TensorDataset(images[seen], labels[seen])
    sampler = MPerClassSampler(labels[seen], 20, length_before_new_iter=900)
    torch.manual_seed(0)
    trunk = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 128, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    model = nn.Sequential(trunk, nn.Linear(128, size))
    # was: loss_func = losses.MultiSimilarityLoss()
    loss_func = S2SDLoss(  # S2SD
        losses.MultiSimilarityLoss(),
        miners.MultiSimilarityMiner(),
        embedder=model[1],  # S2SD: the module whose input is the features
        **S2SDLoss.recipe("from-scratch"),  # S2SD: not if pretrained
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loss_func.add_to(optimizer)  # S2SD: the heads are trained too
    for _ in range(20):
        for x, y in DataLoader(data, batch_size=100, sampler=sampler):
            loss = loss_func(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


print("size  Recall@1  ms a query  index, kB")
for size in (4, 8, 16, 64):
    model = train(size)
    with torch.no_grad():
        embeddings = nn.functional.normalize(model(images[unseen])).numpy()
    index = faiss.IndexFlatIP(size)  # inner products of normalised rows
    index.add(embeddings)
    start = time.perf_counter()
    _, neighbours = index.search(embeddings, 2)  # itself and another
    ms = 1000 * (time.perf_counter() - start) / len(embeddings)
    found = torch.from_numpy(neighbours)
    own = found[:, 0] == torch.arange(len(found))
    nearest = torch.where(own, found[:, 1], found[:, 0])
    recall = (labels[unseen][nearest] == labels[unseen]).float().mean()
    kb = embeddings.nbytes / 1000
    print(f"{size:4}{100 * recall:9.1f}%{ms:12.4f}{kb:11.0f}")
