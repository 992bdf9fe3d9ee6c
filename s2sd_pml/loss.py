"""S2SDLoss: the paper's objective around any metric-learning loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pytorch_metric_learning.losses import SelfSupervisedLoss
from torch import Tensor, nn

from . import cloning, distributed, validation
from .branches import Batch, Branch, MetricLosses, metric_loss
from .capture import FeatureCapture
from .cloning import clone_loss, clone_miner, made_by
from .counter import is_compiling
from .functional import rows_kl, similarity_kl
from .heads import POOLINGS, Pooling, ProjectionHead, Unowned, output_width, pool
from .optimizer import OptimizerGuard
from .recipes import PAPER_HEAD_DIMS, Variants, plain
from .similarity import Similarities, full_precision, similarities
from .wrapper import LossWrapper, UnrecordedModuleDict

Schedule = float | Callable[[int], float]
RECORDS = ["base_loss", "aux_loss", "distill_loss", "feature_distill_loss"]


class S2SDLoss(Variants, LossWrapper):
    """Simultaneous Similarity-based Self-Distillation (S2SD) around a metric-learning loss.

    With features φ (B, F), embeddings ψ = f(φ) (B, D), heads g_1 ... g_m, a base loss L and
    KL(t -> s) as in `functional.relation_kl`, the value is

        1/2 [ L(ψ) + mean_i L_i(g_i(φ)) ] + γ mean_i KL(g_i(φ) -> ψ) + γ_f KL(φ -> ψ)

    The last term is absent before training step ``feature_distill_delay``. Each L_i is an
    independent copy of L with an independent copy of the miner. Teachers are detached: the KL terms
    reach the embedder and, through it, the trunk. Without heads the first bracket is L(ψ) alone;
    with ``feature_distill_weight=0`` as well, the wrapper is the base loss. It is the base loss,
    too, in ``eval()`` mode and, without ``features=``, under ``torch.no_grad()``.

    **The heads are parameters**: put ``loss_func.parameters()`` into an optimizer, or call
    ``add_to``. An OptimizerWarning is raised if the model is trained and the heads are not.

    Args:
        loss: a PML loss, or a factory ``embedding size -> loss`` where ``clone_loss`` refuses it.
        miner: a PML miner, copied for every branch; or None.
        feature_dim: F. Default: read off the first layer of ``embedder``.
        embedder: the module whose input is the features. They are captured as it is called.
        trunk: or the module whose output is the features.
        head_dims: the dimensions of the auxiliary heads, all different.
        head: ``(F, d) -> module`` that maps (B, F) to (B, d).
        distill_weight: γ >= 0, or a function of the training step.
        temperature: T > 0.
        feature_distill_weight: γ_f >= 0, or such a function. 0: no feature distillation.
        feature_distill_delay: the training step, counted from 0, at which it starts.
        pooling: "avg", "avg+max" (of a feature map) or a callable; see ``heads.pool``.
        exclude_self: leave each sample's similarity to itself out of the softmaxes.
        chunk_size: rows of the similarity matrices held at once; None: all.
        gather_distributed: the batch is the global one, of all ranks of torch.distributed.
        embedding_size: D. Needed only for a factory, where ``embedder`` does not end in nn.Linear.

    Attributes:
        components: after forward, detached scalars: "base", "aux", "distill", "feature_distill"
            (unweighted; 0 where a term is not in force), "aux_512", "distill_512" and so on.
        step: training forwards so far, saved and restored with the state_dict.
        capture: the FeatureCapture in use, or None. Assign one after unpickling a loss.

    Public attributes of the base loss (``proxies``, ``get_logits``) can be read here too. Settings
    can be assigned between steps, all but ``head_dims`` and ``feature_dim``.

    Raises:
        S2SDError: a subclass, whose message reports the offending value and suggests a fix.

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
    """

    def __init__(
        self,
        loss: nn.Module | Callable[[int], nn.Module],
        miner: nn.Module | None = None,
        *,
        feature_dim: int | None = None,
        embedder: nn.Module | None = None,
        trunk: nn.Module | None = None,
        head_dims: Sequence[int] = PAPER_HEAD_DIMS,
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
        self.distill_weight, self.temperature = distill_weight, temperature
        self.feature_distill_weight = plain(feature_distill_weight)
        self.feature_distill_delay = feature_distill_delay
        self.pooling = Unowned(pooling) if isinstance(pooling, nn.Module) else pooling
        self.exclude_self, self.chunk_size = exclude_self, chunk_size
        self.gather_distributed = gather_distributed
        self.head_dims = validation.check_head_dims(head_dims)
        validation.check_settings(self)
        validation.check_parts(loss, miner, embedder, trunk, head)
        self.feature_dim = validation.check_feature_dim(
            feature_dim, embedder, trunk, plain_pooling=pooling in POOLINGS, needed=self._distils
        )
        if embedding_size is not None:
            validation.check_whole("embedding_size", embedding_size, at_least=1)
        elif embedder is not None:
            embedding_size = output_width(embedder)
        self.loss = cloning.make_base_loss(loss, embedding_size)
        validation.check_supported(self.loss)
        self.miner = miner
        self.branches = UnrecordedModuleDict()
        for dim in self.head_dims:
            assert self.feature_dim is not None
            self.branches[f"head_{dim}"] = Branch(
                validation.check_head(head(self.feature_dim, dim), self.feature_dim, dim),
                clone_loss(loss, dim) if isinstance(loss, nn.Module) else made_by(loss, dim),
                None if miner is None else clone_miner(miner),
            )
        cloning.check_independent("loss", self._losses.losses)
        cloning.check_independent("head", list(self._heads.values()))
        validation.check_takes_pairs(self.loss, miner)
        self._stacks = self._losses.agree_with_pml()
        self.capture: FeatureCapture | None = None
        if self._distils and embedder is not None:
            self.capture = FeatureCapture(embedder, "input")
        elif self._distils and trunk is not None:
            self.capture = FeatureCapture(trunk, "output")
        self.components: dict[str, Tensor] = {}
        self._guard = OptimizerGuard()
        self.add_to_recordable_attributes(list_of_names=RECORDS, is_stat=True)

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
        batch = Batch([embeddings], [ref_emb], labels, indices_tuple, ref_labels)
        if not self.training or (features is None and not torch.is_grad_enabled()):
            return self._base_loss_alone(batch)
        gather = distributed.Gather(self.gather_distributed)
        batch, φ = self._spaces(batch, gather, features, ref_features)
        ψ, *g = batch.spaces
        γ, γ_f = self._weight("distill_weight"), self._weight("feature_distill_weight")
        m = len(g)

        # 1/2 [ L(ψ) + mean_i L_i(g_i(φ)) ] + γ mean_i KL(g_i(φ) -> ψ) + γ_f KL(φ -> ψ)
        with torch.autocast(ψ.device.type, enabled=False):
            S = self._similarities(ψ, g, φ)
            L = self._metric_losses(S, batch)
            KL = gather.mean(self._relation_kl(S, [ψ, *g, *φ], gather.own_rows))
            loss = (L[0] + L[1:].mean()) / 2 + γ * KL[:m].mean() if g else L[0]
            loss = loss + γ_f * KL[m] if φ else loss

        self._record(L.detach(), KL.detach())
        if L[1:].requires_grad:
            self._guard.check(self._heads, embeddings, self.counter)
        if torch.is_grad_enabled():
            self.counter.tick()
        return gather.touch(loss, self._losses.losses)

    def project(self, features: Tensor) -> dict[int, Tensor]:
        """The heads as embedders, for evaluating the teachers.

        Args:
            features: (N, F), or a map (N, C, H, W).

        Returns:
            head dimension d -> L2-normalised head output (N, d).
        """
        projected = self._project(self._pooled(features, "features"))
        units = [nn.functional.normalize(z, dim=1) for z in projected]
        return dict(zip(self.head_dims, units, strict=True))

    @property
    def _distils_features(self) -> bool:
        return callable(self.feature_distill_weight) or self.feature_distill_weight != 0

    @property
    def _begun(self) -> bool | Tensor:
        return self.counter.has_reached(self.feature_distill_delay)

    @property
    def _distils(self) -> bool:
        return bool(self.head_dims) or self._distils_features

    @property
    def _branches(self) -> dict[str, Branch]:
        return dict(self.branches.items())  # type: ignore[arg-type]

    @property
    def _losses(self) -> MetricLosses:
        every: list[Any] = [self, *self._branches.values()]
        return MetricLosses([of.loss for of in every], [of.miner for of in every])

    def _weight(self, name: str) -> float:
        schedule = getattr(self, name)
        return validation.weight_at(name, schedule, self.step if callable(schedule) else 0)

    def _base_loss_alone(self, batch: Batch) -> Tensor:
        """The loss of the embeddings, as without S2SD."""
        (embeddings,), (ref_emb,), labels, pairs, ref_labels = batch
        validation.check_batch(embeddings, labels, pairs, ref_emb, self.loss)
        others = labels, pairs, ref_emb, ref_labels
        loss = metric_loss(self.loss, self.miner, embeddings, *others)
        if self._distils:
            self._guard.check_eval(loss, embeddings, self)
        self._record(loss.detach().reshape(1), loss.new_zeros(0))
        return loss

    def _spaces(
        self,
        batch: Batch,
        gather: distributed.Gather,
        features: Tensor | None,
        ref_features: Tensor | None,
    ) -> tuple[Batch, list[Tensor]]:
        """The checked global batch in every space, ψ first, and [φ]: [] where it does not teach."""
        (embeddings,), (ref_emb,), labels, indices_tuple, ref_labels = batch
        with gather.agreement(embeddings, labels, self):
            validation.check_settings(self)
            validation.check_batch(embeddings, labels, indices_tuple, ref_emb, self.loss)
            validation.check_gatherable(gather.world_size, indices_tuple, ref_emb)
            φ = self._features(features, embeddings, "features")
            g = self._project(φ)
            gather.compare(self)
        spaces = [full_precision(x) for x in (gather(embeddings), *gather.joined(g))]
        refs: list[Tensor | None] = [None for _ in spaces]
        if ref_emb is embeddings:
            refs = [*spaces]
        elif ref_emb is not None:
            if g:
                validation.check_one_tower(embeddings, ref_emb, labels)
            ref_φ = self._features(ref_features, ref_emb, "ref_features") if g else None
            refs = [ref_emb, *self._project(ref_φ)]
        teaches = self._distils_features and bool(is_compiling() or self._begun)
        teacher = [] if φ is None or not teaches else [gather(full_precision(φ.detach()))]
        return Batch(spaces, refs, gather(labels), indices_tuple, ref_labels), teacher

    def _features(self, features: Tensor | None, embeddings: Tensor, name: str) -> Tensor | None:
        """Pooled features φ of these embeddings: those given, or else those captured."""
        if not self._distils:
            return None
        if features is None:
            features = validation.check_capture(self.capture, name).features_of(embeddings, name)
        validation.check_rows(features, embeddings, name)
        return self._pooled(features, name)

    def _pooled(self, features: Tensor, name: str) -> Tensor:
        validation.check_floating(features, name)
        pooled = pool(features, self.pooling)
        validation.check_width(pooled, self.feature_dim, tuple(features.shape), name)
        return pooled

    def _project(self, features: Tensor | None) -> list[Tensor]:
        """g_i(φ) of every head."""
        if features is None:
            return []
        parameter = next(self.branches.parameters(), None)
        if parameter is not None and parameter.device != features.device:
            self.to(features.device)  # as PML's losses move their parameters themselves
        branches = zip(self.head_dims, self._branches.values(), strict=True)
        return [branch.project(features, dim) for dim, branch in branches]

    def _similarities(self, ψ: Tensor, g: list[Tensor], φ: list[Tensor]) -> Similarities | None:
        """cos in every space; None if nothing is distilled, or in chunks."""
        if self.chunk_size is not None or not (g or φ):
            return None
        return similarities([x.to(ψ.dtype) for x in (ψ, *g)], [x.to(ψ.dtype) for x in φ])

    def _metric_losses(self, S: Similarities | None, batch: Batch) -> Tensor:
        """L in every space, (1 + m,)."""
        losses = self._losses
        if self._stacks and losses.can_stack(batch):
            return losses.stacked(batch, None if S is None else S.spaces)
        return losses.one_by_one(batch)

    def _relation_kl(
        self, S: Similarities | None, spaces: list[Tensor], rows: tuple[int, int] | None
    ) -> Tensor:
        """KL(teacher -> ψ) of all spaces but the first, ψ, over this rank's rows."""
        a, b = rows or (0, len(spaces[0]))
        softmax = (self.temperature, self.exclude_self)
        if S is None:
            kl = rows_kl(spaces[0], spaces[1:], (a, b), *softmax, self.chunk_size)
        else:
            kl = similarity_kl(S.student[a:b], S.teachers[:, a:b], a, *softmax)
        if is_compiling() and len(kl) > len(self.head_dims):
            kl = torch.cat([kl[:-1], kl[-1:] * self._begun])
        return kl

    def _record(self, L: Tensor, KL: Tensor) -> None:
        """Keep the components, all keys every time: loggers want series of equal length."""
        zero, m = L.new_zeros(()), len(self.head_dims)
        aux, kl = (list(x) or [zero] * m for x in (L[1:], KL[:m]))
        self.components = {
            "base": L[0],
            "aux": L[1:].mean() if len(L) > 1 else zero,
            "distill": KL[:m].mean() if m and len(KL) else zero,
            "feature_distill": KL[m] if len(KL) > m else zero,
        }
        for dim, aux_loss, divergence in zip(self.head_dims, aux, kl, strict=True):
            self.components |= {f"aux_{dim}": aux_loss, f"distill_{dim}": divergence}
        if self.collect_stats:
            for record in RECORDS:
                setattr(self, record, self.components[record.removesuffix("_loss")].item())
