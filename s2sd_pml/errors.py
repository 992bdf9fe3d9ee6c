"""Every error names the values seen and the mend; all are ``S2SDError`` and thus ``ValueError``."""

from __future__ import annotations


class S2SDError(ValueError):
    """Base class of everything that ``s2sd_pml`` raises."""


class ArgumentError(S2SDError):
    """An argument has the wrong type or lies outside its range."""


class CloneError(S2SDError):
    """A loss cannot be rebuilt for another embedding size."""


class UnsupportedLossError(S2SDError):
    """A base loss that cannot work inside ``S2SDLoss``, such as one that returns a dict."""


class BatchError(S2SDError):
    """Embeddings, labels or an indices_tuple do not form a batch."""


class FeatureShapeError(S2SDError):
    """Features, or what a head makes of them, have the wrong shape."""


class MissingFeaturesError(S2SDError):
    """No features are known for these embeddings, or they are no longer what they were."""


class OptimizerError(S2SDError):
    """The parameters cannot join this optimizer."""


class DistributedError(S2SDError):
    """The ranks of a process group cannot share this batch."""


class DistributedWarning(UserWarning):
    """The ranks train heads of their own, where they should train the same."""


class OptimizerWarning(UserWarning):
    """The model moves, the auxiliary heads do not: they are in no optimizer."""
