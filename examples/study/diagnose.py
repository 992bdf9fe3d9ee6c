"""What each term of S2SD does over training: its gradient on trunk and embedder, and agreement.

    python examples/study/diagnose.py --distill-weight 50 --feature-distill-weight 50
    python examples/study/diagnose.py --recipe emoji-lite0-msim --output runs/diagnose

After every epoch, on one batch that stays the same: the norm of each weighted term's gradient with
respect to the trunk and to the embedder; the correlation of the student's similarities with each
teacher's; and ρ, how unevenly the spaces are used. All flags are those of train.py.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2sd_pml import S2SDLoss

sys.path.insert(0, str(Path(__file__).parents[1]))  # of trainer and study

from trainer import objectives, options, report, stop, training
from trainer.evaluate import recall_at_k
from trainer.images import Batches
from trainer.network import pool
from trainer.plots import save, tidy
from trainer.reach import PAPERS
from trainer.spaces import rho

SHOWN = {
    "base": ("½ base", "#7f7f7f"),
    "aux": ("½ mean aux", "#2ca02c"),
    "distill": ("γ distill", "#1f77b4"),
    "feature_distill": ("γ_f feature distill", "#ff7f0e"),
}
Row = dict[str, Any]


def gradient(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """The gradient of a loss as one vector; 0 for what it does not reach."""
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    parts = [
        torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)
    ]
    return torch.cat([part.flatten() for part in parts])


def terms(loss_func: S2SDLoss, embeddings: Tensor, labels: Tensor, features: Tensor) -> Row:
    """The weighted terms of the objective, each alone.

    The objective is linear in its weights, so a term is the difference of two values.
    """
    step = loss_func.step
    before = loss_func.distill_weight, loss_func.feature_distill_weight
    delay, loss_func.feature_distill_delay = loss_func.feature_distill_delay, 0

    def value(γ: float, γ_f: float) -> Tensor:
        loss_func.distill_weight, loss_func.feature_distill_weight = γ, γ_f
        result: Tensor = loss_func(embeddings, labels, features=features)
        loss_func.step = step
        return result

    base = loss_func.eval()(embeddings, labels) / 2
    loss_func.train()
    without = value(0, 0)
    found = {
        "base": base,
        "aux": without - base,
        "distill": value(before[0], 0) - without,
        "feature_distill": value(0, before[1]) - without,
    }
    loss_func.distill_weight, loss_func.feature_distill_weight = before
    loss_func.feature_distill_delay = delay
    return found


class Diagnosed(training.Trainer):
    """The S2SD run of the trainer, looked at after every epoch."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.found: list[Row] = []
        data = self.split.train
        keys = Batches(
            data.labels, self.args.batch_size, self.args.per_class, 1, self.args.seed + 1
        )
        ((rows, _),) = keys
        self.images, self.labels = (t.to(self.args.device) for t in data[rows, None])

    def look(self) -> None:
        super().look()
        model, loss_func = self.run.model.eval(), self.loss_func
        features = pool(model.trunk(self.images))
        embeddings = model.embedder(features)
        row: Row = {"step": self.run.step}
        for term, loss in terms(loss_func, embeddings, self.labels, features).items():
            for part, module in (("trunk", model.trunk), ("embedder", model.embedder)):
                row[f"{term} on {part}"] = float(gradient(loss, list(module.parameters())).norm())
        model.train()
        spaces = self.run.project(self.split.test, self.args.workers)
        student = spaces["embeddings"]
        for name, z in spaces.items():
            kind = "student" if name == "embeddings" else name
            row[f"ρ of {kind}"] = rho(F.normalize(z, dim=1))
            recall = recall_at_k(z, self.split.test.labels, ks=(1,))["Recall@1"]
            row[f"Recall@1 of {kind}"] = recall
            if kind != "student":
                row[f"agreement with {kind}"] = agreement(student, z)
        self.found.append(row)


def agreement(a: Tensor, b: Tensor, rows: int = 1000) -> float:
    """The correlation of the cosine similarities of the same images in two spaces."""
    chosen = torch.linspace(0, len(a) - 1, min(rows, len(a))).long()
    above = torch.triu_indices(len(chosen), len(chosen), offset=1)
    pairs = []
    for z in (a, b):
        unit = F.normalize(z[chosen].cpu(), dim=1)
        pairs.append((unit @ unit.T)[above[0], above[1]])
    return float(torch.corrcoef(torch.stack(pairs))[0, 1])


def draw(rows: list[Row], path: Path) -> None:
    """Gradient norms on trunk and embedder, then agreement with the teachers, over steps."""
    figure, grid = plt.subplots(1, 3, figsize=(12.5, 3.9), layout="constrained")
    steps = [row["step"] for row in rows]
    for axes, part in zip(grid, ("trunk", "embedder"), strict=False):
        for term, (label, color) in SHOWN.items():
            values = [row[f"{term} on {part}"] for row in rows]
            if max(values) > 1e-6:  # aux does not reach the embedder, but for rounding
                axes.plot(steps, values, ".-", color=color, label=label)
        axes.set(yscale="log", title=f"gradient norm on the {part}")
    for name in rows[0]:
        if name.startswith("agreement"):
            label = name.removeprefix("agreement ")
            grid[2].plot(steps, [row[name] for row in rows], ".-", label=label)
    grid[2].set(title="correlation of the student's similarities")
    for axes in grid:
        axes.set_xlabel("step")
        tidy(axes, fontsize=8)
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    """Train, write diagnosis.csv and diagnosis.png, print the last row."""
    args = options.parse(options.parser(), argv)
    if args.reach != PAPERS:
        raise SystemExit(f"--reach {args.reach}: what is taken apart here is the paper's objective")
    if args.threads:
        torch.set_num_threads(args.threads)
    split, held_out = training.prepare(args)
    args.output.mkdir(parents=True, exist_ok=True)
    report.write_config(args)
    trainer = Diagnosed("S2SD", objectives.s2sd_loss, args, split, held_out, {}, None)
    with stop.Request() as asked:
        trainer.train(asked)
    with open(args.output / "diagnosis.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(trainer.found[0]))
        writer.writeheader()
        writer.writerows(trainer.found)
    draw(trainer.found, args.output / "diagnosis.png")
    for name, value in trainer.found[-1].items():
        print(f"{name:28} {value if value > 1e-6 else 0:.4g}")


if __name__ == "__main__":
    main()
