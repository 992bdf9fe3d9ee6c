"""Search with the trained model behind faiss: recall and latency by embedding size.

    pip install faiss-cpu && python examples/faiss_search.py
    python examples/faiss_search.py --models small.pt large.pt   # of train.py --export

Without ``--models``, plain_loop.py trains a model of each size. The gallery is all drawings of
unseen classes and ``--copies`` distorted ones of each, which no query meets of itself.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import faiss
import plain_loop
import torch
from trainer import export, icons
from trainer.augment import RandomAffine
from trainer.evaluate import apply
from trainer.network import Network


def search(model: Network, queries: torch.Tensor, gallery: torch.Tensor, k: int):
    """The k nearest of the gallery for each query, and the milliseconds of one query."""
    embed = lambda x: torch.nn.functional.normalize(apply(model, x), dim=1).numpy()  # noqa: E731
    index = faiss.IndexFlatIP(model.embedding_size)
    index.add(embed(gallery))
    embedded = embed(queries)
    start = time.perf_counter()
    _, neighbours = index.search(embedded, k)
    return torch.from_numpy(neighbours), 1000 * (time.perf_counter() - start) / len(queries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, nargs="+")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 512])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--copies", type=int, default=20)
    args = parser.parse_args()
    _, unseen = icons.split(icons.load())
    augment = RandomAffine(seed=1)
    copies = [augment(unseen.images) for _ in range(args.copies)]
    gallery = torch.cat([unseen.images, *copies])
    drawing = torch.arange(len(unseen.images)).repeat(1 + args.copies)

    print("| size | Recall@1 | ms per query | index MB |")
    print("| ---: | ---: | ---: | ---: |")
    for given in args.models or args.sizes:
        torch.manual_seed(0)
        if isinstance(given, Path):
            model = export.load(given)
            if model.description["channels"] != 1:
                raise SystemExit(f"{given} was not trained on icons-400, which is searched here")
        else:
            model = plain_loop.train(given, args.epochs)
        # a query's own drawing and its copies come first at best: look behind them
        neighbours, ms = search(model, unseen.images, gallery, k=2 + args.copies)
        found = drawing[neighbours]
        others = found != torch.arange(len(found))[:, None]
        first = others.int().argmax(dim=1, keepdim=True)
        nearest = found.gather(1, first).squeeze(1)
        recall = (unseen.labels[nearest] == unseen.labels).float().mean().item()
        size, mb = model.embedding_size, gallery.shape[0] * model.embedding_size * 4 / 1e6
        print(f"| {size} | {100 * recall:.1f} | {ms:.3f} | {mb:.0f} |")


if __name__ == "__main__":
    main()
