"""How the parameters move: optimizer, learning rates, precision, clipping, moving average."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from s2sd_pml import S2SDLoss

from .network import Network

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_optimizer(
    args: argparse.Namespace, model: Network, loss_func: nn.Module
) -> torch.optim.Optimizer:
    """Over the model and over what parameters the loss has: heads, proxies, a margin."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
    groups = [
        {"params": list(model.trunk.parameters()), "lr": args.lr},
        {"params": list(model.embedder.parameters()), "lr": args.embedder_lr},
    ]
    optimizer = kind(groups, lr=args.lr, weight_decay=args.weight_decay)
    if isinstance(loss_func, S2SDLoss):
        decay = args.head_weight_decay
        loss_func.add_to(optimizer, lr=args.head_lr, loss_lr=args.loss_lr, weight_decay=decay)
    elif parameters := list(loss_func.parameters()):
        optimizer.add_param_group({"params": parameters, "lr": args.loss_lr, "weight_decay": 0.0})
    return optimizer


def make_schedule(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Of the learning rates, by step. Built after the heads joined the optimizer."""
    milestones = [epoch * args.steps_per_epoch for epoch in args.milestones]

    def factor(step: int) -> float:
        if step < args.warmup:
            return (step + 1) / (args.warmup + 1)
        if args.schedule == "cosine":
            return (1 + math.cos(math.pi * (step - args.warmup) / max(steps - args.warmup, 1))) / 2
        passed = sum(step >= milestone for milestone in milestones)
        return float((args.lr_gamma or 0.3) ** passed)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Stepper:
    """Backward and step under ``--amp`` and ``--clip-grad``."""

    def __init__(
        self, args: argparse.Namespace, optimizer: torch.optim.Optimizer, model: nn.Module
    ) -> None:
        self.optimizer, self.model, self.norm = optimizer, model, args.clip_grad
        self.device = torch.device(args.device).type
        self.dtype = DTYPES.get(args.amp)
        self.scaler: Any = None
        if self.dtype == torch.float16:  # float16 alone can underflow
            if not hasattr(torch.amp, "GradScaler"):
                raise ValueError(f"--amp fp16 needs PyTorch 2.3; this is {torch.__version__}")
            self.scaler = torch.amp.GradScaler(self.device)

    def autocast(self, enabled: bool = True) -> torch.autocast:
        """The precision of ``--amp``."""
        return torch.autocast(
            self.device, self.dtype or torch.bfloat16, enabled=enabled and self.dtype is not None
        )

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a batch."""
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def step(self) -> None:
        """Use the gradients and forget them."""
        if self.norm is not None:
            if self.scaler:
                self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.norm)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict() if self.scaler else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.scaler:
            self.scaler.load_state_dict(state)


class Average:
    """The network that is tested: the moving average of ``--ema``, or the trained one itself."""

    def __init__(self, args: argparse.Namespace, model: Network) -> None:
        self.averaged = None
        if args.ema is not None:
            average = get_ema_multi_avg_fn(args.ema)
            self.averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        self.trained = model

    @property
    def model(self) -> Network:
        """The one to test and to deploy."""
        return self.averaged.module if self.averaged else self.trained

    def update(self) -> None:
        """After a step."""
        if self.averaged:
            self.averaged.update_parameters(self.trained)

    def state_dict(self) -> dict[str, Any]:
        return self.averaged.state_dict() if self.averaged else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.averaged:
            self.averaged.load_state_dict(state)


class Best:
    """The states of the epoch that was best on held-out classes, for ``--choose-epoch``."""

    def __init__(self, **modules: nn.Module) -> None:
        self.modules = modules
        self.score, self.epoch, self.states = -1.0, 0, {}

    def update(self, score: float, epoch: int) -> None:
        """Keep the states of now, if they are better."""
        if score > self.score:
            self.score, self.epoch = score, epoch
            self.states = {
                name: {key: value.clone() for key, value in module.state_dict().items()}
                for name, module in self.modules.items()
            }

    def restore(self) -> None:
        """Go back to the best."""
        for name, state in self.states.items():
            self.modules[name].load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "epoch": self.epoch, "states": self.states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.score, self.epoch, self.states = state["score"], state["epoch"], state["states"]
