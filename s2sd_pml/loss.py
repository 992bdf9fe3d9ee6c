"""S2SDLoss: the paper's objective around any metric-learning loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from pytorch_metric_learning.losses import SelfSupervisedLoss
from pytorch_metric_learning.utils.module_with_records import ModuleWithRecords
from torch import Tensor, nn

from . import cloning, distributed, groups, recipes, validation
from .branch import Branch, metric_loss
from .capture import FeatureCapture
from .cloning import clone_loss, clone_miner, made_by
from .functional import full_precision, relation_kl
from .guard import OptimizerGuard
from .heads import POOLINGS, Pooling, ProjectionHead, Unowned, output_width, pool
from .sharing import SharedIndices
from .unrecorded import UnrecordedModuleDict

Schedule = float | Callable[[int], float]
# What frameworks look for on a module to initialise or unwrap it: never the base loss's.
NOT_FORWARDED = ("weight", "bias", "reset_parameters", "init_weights", "module")
SETTINGS = (
    "feature_dim head_dims distill_weight temperature feature_distill_weight feature_distill_delay "
    "pooling exclude_self chunk_size gather_distributed"
).split()
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
        feature_dim: F. Read off the first layer of ``embedder``, if that is linear or a
            normalisation.
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

    Public attributes of the base loss, such as ``proxies``, ``W`` or ``get_logits``, can be read
    here too. ``head_dims`` and ``feature_dim`` are fixed; other settings can be assigned between
    steps.

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
        >>> sorted(loss_func.project(torch.randn(5, 32)))
        [64, 128]
    """

    loss: nn.Module
    miner: nn.Module | None
    step: Tensor

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
        self.feature_distill_weight = recipes.plain(feature_distill_weight)
        self.feature_distill_delay = feature_distill_delay
        self.pooling = Unowned(pooling) if isinstance(pooling, nn.Module) else pooling
        self.exclude_self = exclude_self
        self.chunk_size = chunk_size
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
        cloning.check_independent("loss", [self.loss, *(b.loss for _, b in self._branches())])
        cloning.check_independent("head", [b.head for _, b in self._branches()])
        validation.check_takes_pairs(self.loss, miner)
        self.register_buffer("step", torch.tensor(0))
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
        """DSD: one head (of the largest published dimension, 2048), no feature distillation.

        Here as in the other variants, an argument that contradicts the name is refused, and a
        recipe fits: DSD takes its largest head, DSD and MSD leave feature distillation out.
        """
        return cls(loss, miner, **recipes.variant_settings("dsd", kwargs))

    @classmethod
    def msd(cls, loss: Any, miner: Any = None, **kwargs: Any) -> S2SDLoss:
        """MSD: several heads, no feature distillation."""
        return cls(loss, miner, **recipes.variant_settings("msd", kwargs))

    @classmethod
    def msdf(cls, loss: Any, miner: Any = None, **kwargs: Any) -> S2SDLoss:
        """MSDF: several heads and, from step ``feature_distill_delay`` on, feature distillation."""
        return cls(loss, miner, **recipes.variant_settings("msdf", kwargs))

    @classmethod
    def msdfa(cls, loss: Any, miner: Any = None, **kwargs: Any) -> S2SDLoss:
        """MSDFA: MSDF on the sum of average- and max-pooled feature maps."""
        return cls(loss, miner, **recipes.variant_settings("msdfa", kwargs))

    @staticmethod
    def recipe(name: str) -> dict[str, Any]:
        """Keyword arguments that go together, to pass on as they are or changed.

        They fit ``S2SDLoss`` and every variant. Where you change ``head_dims`` or
        ``feature_distill_weight``, your value counts as given by hand.

        They are settings of this loss. The example trainer's ``--recipe`` is another thing: a file
        of all flags of a run.

        Args:
            name: "paper", the defaults: weights of 50 at T = 1, for some 8,000 steps at a learning
                rate of 1e-5. Or "small-data", for some hundred steps at a higher one: weights of 10
                at T = 0.1 without the diagonal, so that near neighbours teach, and smaller heads,
                of one layer. What it was chosen by, and what it gains, is measured in the
                documentation.

        Returns:
            ``head_dims``, ``head``, ``distill_weight``, ``temperature``, ``feature_distill_weight``,
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
        if not self.training:
            validation.check_batch(embeddings, labels, indices_tuple, ref_emb, self.loss)
            args = (labels, indices_tuple, ref_emb, ref_labels)
            loss = metric_loss(self.loss, self.miner, embeddings, *args)
            return self._finish(loss, loss, [], loss.new_zeros(0))

        step = int(self.step)
        gather = distributed.Gather(self.gather_distributed)
        with gather.agreement(embeddings, labels, step):
            validation.check_settings(self)  # they may be set between steps
            validation.check_batch(embeddings, labels, indices_tuple, ref_emb, self.loss)
            validation.check_gatherable(gather.world_size, indices_tuple, ref_emb)
            φ = self._features(features, embeddings, "features")
            # a head may refuse its batch too; alone, the base loss comes first
            early = self._project(φ) if gather.world_size > 1 else None
            gather.compare(self, step)
        ψ, labels = gather(embeddings), gather(labels)

        # 1/2 [ L(ψ) + mean_i L(g_i(φ)) ]
        listed = SharedIndices(labels, ψ.device)
        base = metric_loss(
            self.loss, self.miner, ψ, labels, indices_tuple, ref_emb, ref_labels, listed
        )
        joined = gather.joined(self._project(φ) if early is None else early)
        projected = {name: full_precision(z) for name, z in joined.items()}
        projected_ref = projected
        if self.head_dims and ref_emb is not embeddings:
            projected_ref = self._project(self._features(ref_features, ref_emb, "ref_features"))
        branch_losses = [
            branch.metric_loss(
                projected[name],
                labels,
                indices_tuple if branch.miner is None else None,
                projected_ref.get(name),
                ref_labels,
                listed,
            )
            for name, branch in self._branches()
        ]
        aux = [value for value, _ in branch_losses]
        loss = (base + torch.stack(aux).mean()) / 2 if aux else base

        # γ mean_i KL(g_i(φ) -> ψ) + γ_f KL(φ -> ψ)
        γ, γ_f = (
            validation.weight_at(n, getattr(self, n), step)
            for n in ("distill_weight", "feature_distill_weight")
        )
        teachers, weights = list(projected.values()), [γ / len(aux) for _ in aux]
        cosines = [known for _, known in branch_losses]
        if φ is not None and self._distils_features and step >= self.feature_distill_delay:
            teachers, weights = [*teachers, gather(φ.detach())], [*weights, γ_f]
            cosines.append(None)
        kl = loss.new_zeros(0)
        if teachers:
            distillation, kl = relation_kl(
                ψ,
                teachers,
                weights=weights,
                temperature=self.temperature,
                exclude_self=self.exclude_self,
                chunk_size=self.chunk_size,
                rows=gather.own_rows,
                cosines=cosines,
            )
            distillation, kl = gather.mean(distillation, kl)
            loss = loss + distillation
        loss = gather.touch(loss, [self.loss, *(branch.loss for _, branch in self._branches())])

        if any(a.requires_grad for a in aux):
            self._guard.check({name: branch.head for name, branch in self._branches()}, embeddings)
        if torch.is_grad_enabled():
            self.step.add_(1)
        return self._finish(loss, base, aux, kl)

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
            for d, z in zip(self.head_dims, projected.values(), strict=True)
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
        heads = [p for _, branch in self._branches() for p in branch.head.parameters()]
        return groups.split(self, heads, lr, weight_decay, lr if loss_lr is None else loss_lr)

    def add_to(self, optimizer: torch.optim.Optimizer, **group: Any) -> S2SDLoss:
        """Add the groups of ``param_groups`` to an optimizer, and return the loss.

        Args:
            optimizer: built over the model. The learning rate of the model's groups is the default
                for ``lr``; where they differ, its own, if one of them is trained at that. The rate
                of the group that holds the base loss's parameters is the default for ``loss_lr``.
            **group: lr, weight_decay, loss_lr, and further options of the optimizer's groups.

        Raises:
            ArgumentError: if a scheduler holds the optimizer's groups already, if they leave open
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
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in SETTINGS)

    def __setattr__(self, name: str, value: Any) -> None:
        validation.check_assignable(self, name, value)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """Public attributes of the base loss, such as its proxies, where there is none here."""
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            return base_loss_attribute(self, name, error)

    @property
    def _distils_features(self) -> bool:
        return callable(self.feature_distill_weight) or self.feature_distill_weight != 0

    @property
    def _distils(self) -> bool:
        return bool(self.head_dims) or self._distils_features

    def _branches(self) -> Iterable[tuple[str, Branch]]:
        return self.branches.items()  # type: ignore[return-value]

    def _features(
        self, features: Tensor | None, embeddings: Tensor | None, name: str
    ) -> Tensor | None:
        """Pooled features φ of these embeddings: those given, or else those captured."""
        if embeddings is None or not self._distils:
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

    def _project(self, features: Tensor | None) -> dict[str, Tensor]:
        """g_i(φ) by name of the branch."""
        if features is None:
            return {}
        parameter = next(self.branches.parameters(), None)
        if parameter is not None and parameter.device != features.device:
            self.to(features.device)  # as PML's losses move their parameters themselves
        return {
            name: branch.project(features, dim)
            for (name, branch), dim in zip(self._branches(), self.head_dims, strict=True)
        }

    def _finish(self, loss: Tensor, base: Tensor, aux: list[Tensor], kl: Tensor) -> Tensor:
        """Keep the components, all keys every time: loggers want series of equal length."""
        zero, heads = loss.new_zeros(()), range(len(self.head_dims))
        terms = [a.detach() for a in aux] or [zero for _ in heads]
        divergences = list(kl[: len(heads)]) or [zero for _ in heads]
        self.components = {
            "base": base.detach(),
            "aux": torch.stack(terms).mean() if terms else zero,
            "distill": torch.stack(divergences).mean() if divergences else zero,
            "feature_distill": kl[len(heads)] if len(kl) > len(heads) else zero,
        }
        for dim, term, divergence in zip(self.head_dims, terms, divergences, strict=True):
            self.components |= {f"aux_{dim}": term, f"distill_{dim}": divergence}
        if self.collect_stats:
            for record in RECORDS:
                setattr(self, record, self.components[record.removesuffix("_loss")].item())
        return loss


def base_loss_attribute(loss_func: nn.Module, name: str, error: AttributeError) -> Any:
    """An attribute that only the base loss has, or an AttributeError that names the base loss."""
    base = loss_func.__dict__.get("_modules", {}).get("loss")
    if base is None or name.startswith("_"):
        raise error
    if name in NOT_FORWARDED and hasattr(base, name):
        raise AttributeError(f"S2SDLoss has no {name!r}. Use loss_func.loss.{name}.") from None
    try:
        return getattr(base, name)
    except AttributeError:
        raise AttributeError(
            f"S2SDLoss has no {name!r}, and neither has loss_func.loss, the base loss "
            f"{type(base).__name__}."
        ) from error
