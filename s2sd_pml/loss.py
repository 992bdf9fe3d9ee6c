"""S2SDLoss: the paper's objective around any metric-learning loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pytorch_metric_learning.losses import SelfSupervisedLoss
from pytorch_metric_learning.utils.module_with_records import ModuleWithRecords
from torch import Tensor, nn

from . import distributed, groups, recipes, settings
from .branches import Batch, Branch, can_stack, metric_loss, metric_losses, stacks
from .capture import FeatureCapture, is_compiling
from .cloning import clone_loss, clone_miner
from .errors import ArgumentError
from .functional import rows_kl, similarity_kl
from .guard import OptimizerGuard
from .heads import POOLINGS, Pooling, ProjectionHead, Unowned, pool
from .similarity import cosine_block, full_precision
from .stacking import is_cosine, stacked_losses
from .unrecorded import UnrecordedModuleDict
from .validation import (
    captured,
    check_batch,
    check_floating,
    check_gatherable,
    check_rows,
    check_settings,
    check_width,
    weight_at,
)

Schedule = float | Callable[[int], float]
RECORDS = ["base_loss", "aux_loss", "distill_loss", "feature_distill_loss"]


class S2SDLoss(ModuleWithRecords):  # type: ignore[misc]
    """Simultaneous Similarity-based Self-Distillation (S2SD) around a metric-learning loss.

    With features φ (B, F), embeddings ψ = f(φ) (B, D), heads g_1 ... g_m, a base loss L and
    KL(t -> s) as in `functional.relation_kl`, the value is

        1/2 [ L(ψ) + mean_i L_i(g_i(φ)) ] + γ mean_i KL(g_i(φ) -> ψ) + γ_f KL(φ -> ψ)

    The last term is absent before training step ``feature_distill_delay``. Each L_i is an independent copy
    of L with an independent copy of the miner. Teachers are detached: the KL terms reach the
    embedder and, through it, the trunk. Without heads the first bracket is L(ψ) alone; with
    ``feature_distill_weight=0`` as well, and in ``eval()`` mode, the wrapper is the base loss.

    **The heads are parameters**: put ``loss_func.parameters()`` into an optimizer, or call
    ``add_to``. A warning tells if they do not move while the model does.

    Args:
        loss: a PML loss, or a factory ``embedding size -> loss`` for losses that
            ``clone_loss`` does not know.
        miner: a PML miner, copied for every branch; or None.
        feature_dim: F. Inferred from ``embedder`` if its first layer with parameters is nn.Linear.
        embedder: the module whose input is the features. They are captured as it is called.
        trunk: or the module whose output is the features.
        head_dims: the dimensions of the auxiliary heads, all different.
        head: ``(F, d) -> module`` that maps (B, F) to (B, d).
        distill_weight: γ >= 0, or a function of the training step.
        temperature: T > 0.
        feature_distill_weight: γ_f >= 0, or a function of the training step. 0: no feature distillation.
        feature_distill_delay: the training step, counted from 0, at which feature distillation starts.
        pooling: "avg", "avg+max" (of a feature map) or a callable; see ``heads.pool``.
        exclude_self: leave each sample's similarity to itself out of the softmaxes.
        chunk_size: rows of the similarity matrices held at once; None: all.
        gather_distributed: the batch is the global one, of all ranks of torch.distributed.
        embedding_size: D. Needed only for a factory where ``embedder`` does not tell it.

    Attributes:
        components: after forward, detached scalars: "base", "aux", "distill", "feature_distill"
            (unweighted; 0 where a term is not in force), and "aux_512",
            "distill_512" and so on for each head.
        step: training forwards so far, a buffer that is saved and restored with the state_dict.
        capture: the FeatureCapture in use, or None. Assign one after unpickling a loss.

    Raises:
        S2SDError: a subclass, whose message names the values seen and the mend.

    Source:
        Roth et al., "Simultaneous Similarity-based Self-Distillation for Deep Metric Learning",
        ICML 2021 (arXiv 2009.08348). The defaults are the paper's MSDF.

    Examples:
        >>> import torch
        >>> from pytorch_metric_learning import losses, miners
        >>> trunk, embedder = nn.Linear(20, 32), nn.Linear(32, 8)
        >>> loss_func = S2SDLoss(
        ...     losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner(),
        ...     embedder=embedder, head_dims=(64, 128))
        >>> optimizer = torch.optim.Adam([*trunk.parameters(), *embedder.parameters()], lr=1e-3)
        >>> loss_func = loss_func.add_to(optimizer)
        >>> embeddings = embedder(trunk(torch.randn(12, 20)))
        >>> loss_func(embeddings, torch.arange(12) % 3).backward()
        >>> sorted(loss_func.project(torch.randn(5, 32)))
        [64, 128]
    """

    loss: nn.Module
    miner: nn.Module | None

    def __init__(
        self,
        loss: nn.Module | Callable[[int], nn.Module],
        miner: nn.Module | None = None,
        *,
        feature_dim: int | None = None,
        embedder: nn.Module | None = None,
        trunk: nn.Module | None = None,
        head_dims: Sequence[int] = recipes.PAPER_HEAD_DIMS,
        head: Callable[[int, int], nn.Module] = ProjectionHead,
        distill_weight: Schedule = 50.0,
        temperature: float = 1.0,
        feature_distill_weight: Schedule = 50.0,
        feature_distill_delay: int = 1000,
        pooling: Pooling = "avg",
        exclude_self: bool = False,
        chunk_size: int | None = None,
        gather_distributed: bool = False,
        embedding_size: int | None = None,
    ) -> None:
        super().__init__()
        self.distill_weight = distill_weight
        self.temperature = temperature
        self.feature_distill_weight = feature_distill_weight
        self.feature_distill_delay = feature_distill_delay
        self.pooling = Unowned(pooling) if isinstance(pooling, nn.Module) else pooling
        self.exclude_self = exclude_self
        self.chunk_size = chunk_size
        self.gather_distributed = gather_distributed
        self.head_dims = settings.head_dims(head_dims)
        settings.scalars(self)
        settings.modules(loss, miner, embedder, trunk, head)
        self.feature_dim = settings.feature_dim(
            feature_dim, embedder, trunk, plain_pooling=pooling in POOLINGS, needed=self._distils
        )
        self.loss = settings.base_loss(loss, embedding_size, embedder)
        self.miner = miner
        self.branches = UnrecordedModuleDict()
        for dim in self.head_dims:
            assert self.feature_dim is not None
            self.branches[f"head_{dim}"] = Branch(
                settings.head_module(head(self.feature_dim, dim), self.feature_dim, dim),
                clone_loss(loss, dim)
                if isinstance(loss, nn.Module)
                else settings.made_by(loss, dim),
                None if miner is None else clone_miner(miner),
            )
        settings.independent("loss", [self.loss, *(b.loss for b in self._branches())])
        settings.independent("head", [b.head for b in self._branches()])
        settings.takes_pairs(self.loss, miner)
        self._stacks = stacks(*self._losses_and_miners())
        self.register_buffer("_compiled_steps", torch.tensor(0), persistent=False)
        self.step = 0
        self.capture: FeatureCapture | None = None
        if self._distils and embedder is not None:
            self.capture = FeatureCapture(embedder, "input")
        elif self._distils and trunk is not None:
            self.capture = FeatureCapture(trunk, "output")
        self.components: dict[str, Tensor] = {}
        self._guard = OptimizerGuard()
        self.add_to_recordable_attributes(list_of_names=RECORDS, is_stat=True)

    @classmethod
    def dsd(cls, loss: Any, miner: Any = None, **kwargs: Any) -> S2SDLoss:
        """DSD: one head (of the largest published dimension, 2048), no feature distillation."""
        self = cls(loss, miner, **{"head_dims": (2048,), "feature_distill_weight": 0.0, **kwargs})
        if len(self.head_dims) != 1:
            raise ArgumentError(f"DSD has one head, not head_dims={self.head_dims}. Use msd.")
        return self

    @classmethod
    def msd(cls, loss: Any, miner: Any = None, **kwargs: Any) -> S2SDLoss:
        """MSD: several heads, no feature distillation."""
        return cls(loss, miner, **{"feature_distill_weight": 0.0, **kwargs})

    @classmethod
    def msdf(cls, loss: Any, miner: Any = None, **kwargs: Any) -> S2SDLoss:
        """MSDF: several heads and, from step ``feature_distill_delay`` on, feature distillation."""
        return cls(loss, miner, **kwargs)

    @classmethod
    def msdfa(cls, loss: Any, miner: Any = None, **kwargs: Any) -> S2SDLoss:
        """MSDFA: MSDF on the sum of average- and max-pooled feature maps."""
        return cls(loss, miner, **{"pooling": "avg+max", **kwargs})

    @staticmethod
    def recipe(name: str) -> dict[str, Any]:
        """Keyword arguments that go together, to pass on as they are or changed.

        They are settings of this loss. The example trainer's ``--recipe`` is another thing: a file
        of all flags of a run.

        Args:
            name: "paper", the defaults: weights of 50 at T = 1, for some 8,000 steps at a learning
                rate of 1e-5. Or "small-data", for some hundred steps at a higher one: weights of 10
                at T = 0.1 without the diagonal, so that near neighbours teach, and smaller heads,
                of one layer. What it was chosen by, and what it gains, is measured in the
                documentation.

        Returns:
            ``head_dims``, ``head``, ``weight``, ``temperature``, ``feature_distill_weight``,
            ``feature_distill_delay`` and ``exclude_self``.

        Raises:
            ArgumentError: for another name.

        Examples:
            >>> from pytorch_metric_learning import losses
            >>> settings = S2SDLoss.recipe("small-data")
            >>> settings["temperature"], settings["exclude_self"]
            (0.1, True)
            >>> loss_func = S2SDLoss(losses.NTXentLoss(), feature_dim=32, **settings)
        """
        return recipes.recipe(name)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        features: Tensor | None = None,
        ref_features: Tensor | None = None,
    ) -> Tensor:
        """The S2SD objective for one batch; the base loss in ``eval()`` mode.

        Args:
            embeddings: ψ, (B, D), as the model returns them.
            labels: (B,) class labels, or None for losses without.
            indices_tuple: pairs or triplets of a miner outside. Without a miner of its own, every
                branch uses it; else it serves the base branch and the others mine for themselves.
            ref_emb: (R, D) reference embeddings, for losses that compare with them.
            ref_labels: (R,) labels of ``ref_emb``.
            features: φ, (B, F) or a map (B, C, H, W). Default: what was captured.
            ref_features: the features of ``ref_emb``. Default: what was captured.

        Returns:
            A scalar.
        """
        self.reset_stats()
        if isinstance(self.loss, SelfSupervisedLoss) and ref_emb is None:
            labels, ref_emb = None, labels  # that loss is called with (embeddings, ref_emb)
        batch = Batch(labels, indices_tuple, ref_labels)
        if not self.training or (features is None and not torch.is_grad_enabled()):
            return self._base_loss_alone(embeddings, batch, ref_emb)
        gather = distributed.Gather(self.gather_distributed)
        ψ, g, φ, refs, batch = self._inputs(
            gather, embeddings, batch, ref_emb, features, ref_features
        )
        γ, γ_f = self._weight("distill_weight"), self._weight("feature_distill_weight")

        with torch.autocast(ψ.device.type, enabled=False):
            stacked = self._can_stack([ψ, *g], refs, batch)
            S = self._similarities(ψ, g, φ, stacked)
            L = self._metric_losses(S, [ψ, *g], refs, batch, stacked)
            kl = gather.mean(self._relation_kl(S, ψ, [*g, *φ], gather.own_rows))

            # 1/2 [ L(ψ) + mean_i L_i(g_i(φ)) ] + γ mean_i KL(g_i(φ) -> ψ) + γ_f KL(φ -> ψ)
            m = len(g)
            loss = (L[0] + L[1:].mean()) / 2 + γ * kl[:m].mean() if m else L[0]
            loss = loss + γ_f * kl[m] if φ else loss

        loss = gather.touch(loss, [self.loss, *(branch.loss for branch in self._branches())])
        self._record(L.detach(), kl.detach())
        if L[1:].requires_grad:
            self._guard.check(self._heads(), embeddings)
        if torch.is_grad_enabled():
            self._tick()
        return loss

    def project(self, features: Tensor) -> dict[int, Tensor]:
        """The heads as embedders, for evaluating the teachers.

        Args:
            features: (N, F), or a map (N, C, H, W).

        Returns:
            head dimension d -> L2-normalised head output (N, d).
        """
        projected = self._project(self._pooled(features, "features"))
        return {
            d: nn.functional.normalize(z, dim=1)
            for d, z in zip(self.head_dims, projected, strict=True)
        }

    def param_groups(
        self, lr: float, weight_decay: float = 0.0, loss_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Optimizer groups: the heads, and the parameters of base and branch losses, if any.

        Args:
            lr: learning rate of the heads.
            weight_decay: of the heads (the paper's is 0). Loss parameters never decay.
            loss_lr: learning rate of the losses' own parameters, such as proxies or a learnable
                margin; default ``lr``.
        """
        heads = [p for branch in self._branches() for p in branch.head.parameters()]
        return groups.split(self, heads, lr, weight_decay, lr if loss_lr is None else loss_lr)

    def add_to(self, optimizer: torch.optim.Optimizer, **group: Any) -> S2SDLoss:
        """Add the groups of ``param_groups`` to an optimizer, and return the loss.

        Args:
            optimizer: built over the model. The learning rate of the model's groups is the default
                for ``lr``; where they differ, its own, if one of them is trained at that. The rate
                of the group that holds the base loss's parameters is the default for ``loss_lr``.
            **group: lr, weight_decay, loss_lr, and further options of the optimizer's groups.

        Raises:
            OptimizerError: if a scheduler holds the optimizer's groups already, if they leave open
                which learning rate to take, or for an option that the optimizer does not have.

        Parameters that the optimizer holds already are left where they are.
        """
        own = {k: group.pop(k) for k in ("lr", "weight_decay", "loss_lr") if k in group}
        groups.check(optimizer, group)
        if "lr" not in own:
            own["lr"] = groups.rate(optimizer, self)
        own.setdefault("loss_lr", groups.rate_of(optimizer, self.loss))
        groups.add(optimizer, self.param_groups(**own), group)
        return self

    def extra_repr(self) -> str:
        names = "feature_dim head_dims distill_weight temperature feature_distill_weight feature_distill_delay pooling"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names.split())

    @property
    def step(self) -> int:
        """Training forwards so far. Compiled ones are counted on the device."""
        return self._steps + (int(self._compiled_steps) if self._compiled else 0)

    @step.setter
    def step(self, step: int) -> None:
        self._steps, self._compiled = int(step), False
        self._compiled_steps.zero_()

    def _tick(self) -> None:
        if is_compiling():  # a number of a module is a constant to torch.compile
            self._compiled = True
            self._compiled_steps.add_(1)
        else:
            self._steps += 1

    def get_extra_state(self) -> Tensor:
        """The step, as a tensor: some formats of checkpoints hold nothing else."""
        return torch.tensor(self.step)

    def set_extra_state(self, state: Tensor) -> None:
        self.step = int(state)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if f"{prefix}step" in state_dict:  # a buffer, in former checkpoints
            state_dict[f"{prefix}_extra_state"] = state_dict.pop(f"{prefix}step")
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def _distils_features(self) -> bool:
        return callable(self.feature_distill_weight) or self.feature_distill_weight != 0

    @property
    def _distils(self) -> bool:
        return bool(self.head_dims) or self._distils_features

    def _heads(self) -> dict[str, nn.Module]:
        return {name: branch.head for name, branch in self.branches.items()}  # type: ignore[misc]

    def _branches(self) -> list[Branch]:
        return list(self.branches.values())  # type: ignore[arg-type]

    def _base_loss_alone(self, embeddings: Tensor, batch: Batch, ref_emb: Tensor | None) -> Tensor:
        """The loss of the embeddings, as without S2SD."""
        check_batch(embeddings, batch.labels, batch.indices_tuple, ref_emb, self.loss)
        loss = metric_loss(self.loss, self.miner, embeddings, batch, ref_emb)
        self._record(loss.detach().reshape(1), loss.new_zeros(0))
        return loss

    def _inputs(
        self,
        gather: distributed.Gather,
        embeddings: Tensor,
        batch: Batch,
        ref_emb: Tensor | None,
        features: Tensor | None,
        ref_features: Tensor | None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor | None], Batch]:
        """The checked global batch.

        Returns:
            ψ, g_i(φ) of every head, [φ] (empty where it does not teach at this step), the
            reference embeddings of every space, and what the losses take beside them.
        """
        with gather.agreement(embeddings, batch.labels, self):
            check_settings(self)
            check_batch(embeddings, batch.labels, batch.indices_tuple, ref_emb, self.loss)
            check_gatherable(gather.world_size, batch.indices_tuple, ref_emb)
            φ = self._features(features, embeddings, "features")
            g = self._project(φ)
            gather.compare(self)
        ψ, g = gather(full_precision(embeddings)), gather.joined([full_precision(z) for z in g])
        batch = batch._replace(labels=gather(batch.labels))
        delay = self.feature_distill_delay
        teaches = self._distils_features and (is_compiling() or self.step >= delay)
        teacher = [gather(full_precision(φ.detach()))] if φ is not None and teaches else []
        refs: list[Tensor | None] = [None] * (1 + len(g))
        if ref_emb is embeddings:
            refs = [ψ, *g]
        elif ref_emb is not None:
            refs = [ref_emb]
            if g:
                refs += self._project(self._features(ref_features, ref_emb, "ref_features"))
        return ψ, g, teacher, refs, batch

    def _features(self, features: Tensor | None, embeddings: Tensor, name: str) -> Tensor | None:
        """Pooled features φ of these embeddings: those given, or else those captured."""
        if not self._distils:
            return None
        if features is None:
            features = captured(self.capture, embeddings, name)
        check_rows(features, embeddings, name)
        return self._pooled(features, name)

    def _pooled(self, features: Tensor, name: str) -> Tensor:
        check_floating(features, name)
        pooled = pool(features, self.pooling)
        check_width(pooled, self.feature_dim, tuple(features.shape), name)
        return pooled

    def _project(self, features: Tensor | None) -> list[Tensor]:
        """g_i(φ) for every head."""
        if features is None:
            return []
        parameter = next(self.branches.parameters(), None)
        if parameter is not None and parameter.device != features.device:
            self.to(features.device)  # as PML's losses move their parameters themselves
        return [
            branch.project(features, dim)
            for branch, dim in zip(self._branches(), self.head_dims, strict=True)
        ]

    def _can_stack(self, spaces: list[Tensor], refs: list[Tensor | None], batch: Batch) -> bool:
        return self._stacks and can_stack(*self._losses_and_miners(), spaces, refs, batch)

    def _losses_and_miners(self) -> tuple[list[nn.Module], list[nn.Module | None]]:
        every = [self, *self._branches()]
        return [of.loss for of in every], [of.miner for of in every]

    def _similarities(
        self, ψ: Tensor, g: list[Tensor], φ: list[Tensor], stacked: bool
    ) -> Tensor | None:
        """cos of every space, (1 + m, B, B) and that of φ; None where it is made in chunks."""
        if self.chunk_size is not None or not (g or φ):
            return None
        learns = stacked and is_cosine(self.loss.distance)  # the metric losses are made of it
        teachers = [*(g if learns else [z.detach() for z in g]), *φ]
        return cosine_block([ψ, *(t.to(ψ.dtype) for t in teachers)])

    def _metric_losses(
        self,
        S: Tensor | None,
        spaces: list[Tensor],
        refs: list[Tensor | None],
        batch: Batch,
        stacked: bool,
    ) -> Tensor:
        """L of every space, (spaces,)."""
        losses, miners = self._losses_and_miners()
        if stacked:
            cosines = None if S is None else S[: len(spaces)]
            return stacked_losses(losses, miners, spaces, *batch[:2], cosines)
        values = metric_losses(losses, miners, spaces, refs, batch)
        return torch.stack([value.to(spaces[0].dtype) for value in values])

    def _relation_kl(
        self, S: Tensor | None, ψ: Tensor, teachers: list[Tensor], own_rows: tuple[int, int] | None
    ) -> Tensor:
        """KL(teacher -> ψ) of every teacher, over this rank's rows."""
        start, stop = own_rows or (0, len(ψ))
        options = {"temperature": self.temperature, "exclude_self": self.exclude_self}
        if S is None:
            kl = rows_kl(ψ, teachers, (start, stop), chunk_size=self.chunk_size, **options)
        else:
            kl = similarity_kl(S[0, start:stop], S[1:, start:stop], start, **options)
        if is_compiling() and len(teachers) > len(self.head_dims):
            due = self._compiled_steps + self._steps >= self.feature_distill_delay
            kl = torch.cat([kl[:-1], kl[-1:] * due])
        return kl

    def _weight(self, name: str) -> float:
        weight = getattr(self, name)
        return weight_at(name, weight, self.step if callable(weight) else 0)

    def _record(self, L: Tensor, kl: Tensor) -> None:
        """Keep the components, all keys every time: loggers want series of equal length."""
        zero, m = L.new_zeros(()), len(self.head_dims)
        self.components = {
            "base": L[0],
            "aux": L[1:].mean() if len(L) > 1 else zero,
            "distill": kl[:m].mean() if len(kl) and m else zero,
            "feature_distill": kl[m] if len(kl) > m else zero,
        }
        for i, dim in enumerate(self.head_dims):
            self.components[f"aux_{dim}"] = L[1 + i] if len(L) > 1 else zero
            self.components[f"distill_{dim}"] = kl[i] if len(kl) else zero
        if self.collect_stats:
            for record in RECORDS:
                setattr(self, record, self.components[record.removesuffix("_loss")].item())
