"""S2SD for pytorch-metric-learning: self-distillation for any metric-learning loss."""

from . import errors, functional
from .capture import FeatureCapture
from .cloning import clone_loss
from .heads import ProjectionHead
from .loss import S2SDLoss

__all__ = ["FeatureCapture", "ProjectionHead", "S2SDLoss", "clone_loss", "errors", "functional"]
__version__ = "0.1.0"
