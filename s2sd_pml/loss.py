"""S2SDLoss: the paper's objective around any metric-learning loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pytorch_metric_learning.losses import SelfSupervisedLoss
from torch import Tensor, nn

from . import cloning, distributed, validation
from .branches import Batch, make_branch, metric_loss
from .capture import FeatureCapture
from .counter import is_compiling
from .functional import rows_kl, similarity_kl
from .heads import POOLINGS, Pooling, ProjectionHead, output_width
from .optimizer import OptimizerGuard
from .recipes import PAPER_HEAD_DIMS, Variants, plain
from .similarity import Similarities, similarities
from .spaces import Spaces
from .teachers import Schedule, TeacherWeight, has_weight
from .wrapper import UnrecordedModuleDict


class S2SDLoss(Variants, Spaces):
    """Simultaneous Similarity-based Self-Distillation (S2SD) around a metric-learning loss.

    With features φ (B, F), embeddings ψ = f(φ) (B, D), heads g_1 ... g_m, a base loss L and
    KL(t -> s) as in `functional.relation_kl`, the value is

        1/2 [ L(ψ) + mean_i L_i(g_i(φ)) ] + γ mean_i KL(g_i(φ) -> ψ) + γ_f KL(φ -> ψ)

    The last term is absent before training step ``feature_distill_delay``. Each L_i is an
    independent copy of L with an independent copy of the miner. Teachers are detached: the KL terms
    reach the embedder and, through it, the trunk. Without heads the first bracket is L(ψ) alone;
    with ``feature_distill_weight=0`` as well, the wrapper is the base loss. It is the base loss,
    too, in ``eval()`` mode and, without ``features=``, under ``torch.no_grad()``.

    Beyond the paper, each outside teacher t (B, any width) adds γ_t KL(t -> ψ), and with
    ``matryoshka_dims`` the prefixes ψ_:k, (B, k), are students too: L(ψ) and every KL above become
    their means over the given sizes k and the whole embedding.

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
        matryoshka_dims: sizes k < D of the prefixes that are students as well.
        teacher_weight: γ_t >= 0, or such a function, of each outside teacher; or one per name, as a
            dict. Above 0, every training step takes ``teachers={name: tensor}``.

    Attributes:
        components: after forward, detached scalars: "base", "aux", "distill", "feature_distill"
            (unweighted; 0 where a term is not in force), "aux_512", "distill_512" and so on. KL
            terms are means over students. A prefix adds "base_16", a teacher "teacher_<name>".
        step: training forwards so far, saved and restored with the state_dict.
        capture: the FeatureCapture in use, or None. Assign one after unpickling a loss.

    Public attributes of the base loss (``proxies``, ``get_logits``) can be read here too. Settings
    can be assigned between steps, all but ``head_dims``, ``matryoshka_dims`` and ``feature_dim``.

    Raises:
        S2SDError: a subclass, whose message reports the offending value and suggests a fix.

    Source:
        Roth et al., "Simultaneous Similarity-based Self-Distillation for Deep Metric Learning",
        ICML 2021 (arXiv 2009.08348). The defaults are the paper's MSDF. Prefixes: Kusupati et al.,
        "Matryoshka Representation Learning", NeurIPS 2022 (arXiv 2205.13147).

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

        Three index sizes from one training, and a teacher that was trained before:

        >>> loss_func = S2SDLoss(
        ...     losses.MultiSimilarityLoss(), embedder=embedder, head_dims=(64,),
        ...     matryoshka_dims=(2, 4), teacher_weight=10.0)
        >>> images, labels = torch.randn(12, 20), torch.arange(12) % 3
        >>> larger = nn.Linear(20, 100).requires_grad_(False)
        >>> loss = loss_func(embedder(trunk(images)), labels, teachers={"larger": larger(images)})
        >>> [name for name in loss_func.components if name[-1] in "24r"]
        ['aux_64', 'distill_64', 'base_2', 'base_4', 'teacher_larger']
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
        matryoshka_dims: Sequence[int] = (),
        teacher_weight: TeacherWeight = 0.0,
    ) -> None:
        super().__init__()
        self.distill_weight, self.temperature = distill_weight, temperature
        self.feature_distill_weight = plain(feature_distill_weight)
        self.feature_distill_delay = feature_distill_delay
        self.pooling = pooling
        self.exclude_self, self.chunk_size = exclude_self, chunk_size
        self.gather_distributed, self.teacher_weight = gather_distributed, teacher_weight
        self.head_dims = validation.check_dims("head_dims", head_dims)
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
        size = embedding_size or cloning.embedding_size_of(self.loss)
        self.matryoshka_dims = validation.check_matryoshka_dims(matryoshka_dims, size)
        self.branches, heads = UnrecordedModuleDict(), {}
        for dim in self.head_dims:
            assert self.feature_dim is not None
            g = validation.check_head(head(self.feature_dim, dim), self.feature_dim, dim)
            heads[f"head_{dim}"] = make_branch(g, dim, loss, miner)
        for k in self.matryoshka_dims:
            self.branches[f"prefix_{k}"] = make_branch(nn.Identity(), k, loss, miner)
        self.branches.update(heads)
        cloning.check_independent("loss", self._losses.losses)
        cloning.check_independent("head", [branch.head for branch in self._branches.values()])
        validation.check_takes_pairs(self.loss, miner)
        self._stacks = self._losses.agree_with_pml()
        self.capture: FeatureCapture | None = None
        if self._distils and embedder is not None:
            self.capture = FeatureCapture(embedder, "input")
        elif self._distils and trunk is not None:
            self.capture = FeatureCapture(trunk, "output")
        self._guard = OptimizerGuard()

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
        teachers: Mapping[str, Tensor] | None = None,
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
            teachers: outside teachers by name, (B, any width); see ``teacher_weight``.

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
        batch, others = self._spaces(batch, gather, features, ref_features, teachers)
        n, m = 1 + len(self.matryoshka_dims), len(self.head_dims)
        γ, *γ_others = (self._weight(term) for term in ("distill", *others))

        # 1/2 [ mean_k L(ψ_:k) + mean_i L_i(g_i(φ)) ] + γ mean_i mean_k KL(g_i(φ) -> ψ_:k)
        #     + γ_f mean_k KL(φ -> ψ_:k) + Σ_t γ_t mean_k KL(t -> ψ_:k)
        with torch.autocast(embeddings.device.type, enabled=False):
            S = self._similarities(batch.spaces, others)
            L = self._metric_losses(S, batch)  # n students, m heads
            KL = gather.mean(self._relation_kl(S, batch.spaces, others, gather.own_rows))
            (L_ψ, L_g), (KL_g, KL_others) = parts(L, n), parts(KL, m)
            loss = (mean(L_ψ) + mean(L_g)) / 2 + γ * mean(KL_g) if m else mean(L_ψ)
            for γ_t, KL_t in zip(γ_others, KL_others, strict=True):  # φ, then outside teachers
                loss = loss + γ_t * KL_t

        self._record(L.detach(), KL.detach(), others)
        if L.requires_grad:
            self._guard.check(self._trained, embeddings, self.counter)
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

    def _weight(self, term: str) -> float:
        """What a component is multiplied by at this step: γ, γ_f, or γ_t of an outside teacher."""
        kind, _, teacher = term.partition("_") if term.startswith("teacher_") else (term, "", "")
        name, schedule = f"{kind}_weight", getattr(self, f"{kind}_weight")
        if isinstance(schedule, Mapping):
            name, schedule = f"{name}[{teacher!r}]", schedule[teacher]
        if callable(schedule):
            return validation.check_weight(name, schedule(self.step), f" at step {self.step}")
        return validation.check_weight(name, schedule)

    def _base_loss_alone(self, batch: Batch) -> Tensor:
        """The loss of the embeddings, as without S2SD."""
        (embeddings,), (ref_emb,), labels, pairs, ref_labels = batch
        validation.check_batch(embeddings, labels, pairs, ref_emb, self.loss)
        others = labels, pairs, ref_emb, ref_labels
        loss = metric_loss(self.loss, self.miner, embeddings, *others)
        if self._distils or self.matryoshka_dims or has_weight(self.teacher_weight):
            self._guard.check_eval(loss, embeddings, self)
        self._record(loss.detach().reshape(1), loss.new_zeros(0))
        return loss

    def _similarities(self, spaces: list[Tensor], others: dict[str, Tensor]) -> Similarities | None:
        """cos in every space; None if nothing is distilled, or in chunks."""
        if self.chunk_size is not None or not (self.head_dims or others):
            return None
        spaces = [x.to(spaces[0].dtype) for x in spaces]
        return similarities(spaces, [*others.values()], 1 + len(self.matryoshka_dims))

    def _metric_losses(self, S: Similarities | None, batch: Batch) -> Tensor:
        """L in every space, (students + m,)."""
        losses = self._losses
        if self._stacks and losses.can_stack(batch):
            return losses.stacked(batch, None if S is None else S.spaces)
        return losses.one_by_one(batch)

    def _relation_kl(
        self,
        S: Similarities | None,
        spaces: list[Tensor],
        others: dict[str, Tensor],
        rows: tuple[int, int] | None,
    ) -> Tensor:
        """mean_k KL(teacher -> ψ_:k) of heads and others, over this rank's rows: (m + others,)."""
        a, b = rows or (0, len(spaces[0]))
        softmax = (self.temperature, self.exclude_self)
        if S is None:
            n = 1 + len(self.matryoshka_dims)
            teachers = [*spaces[n:], *others.values()]
            kl = rows_kl(spaces[:n], teachers, (a, b), *softmax, self.chunk_size)
        else:
            kl = similarity_kl(S.students[..., a:b, :], S.teachers[:, a:b], a, *softmax)
        if is_compiling() and "feature_distill" in others:
            m = len(self.head_dims)
            kl = torch.cat([kl[:m], kl[m : m + 1] * self._begun, kl[m + 1 :]])
        return kl


def mean(values: Tensor) -> Tensor:
    """The mean of (n,) values; one value costs no operation."""
    return values.mean() if len(values) > 1 else values.reshape(())


def parts(values: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The first values and the others; all or none cost no operation."""
    if first in (0, len(values)):
        return values[:first], values[first:]
    front, back = torch.split(values, [first, len(values) - first])
    return front, back
