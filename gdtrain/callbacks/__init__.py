"""Callbacks for a Lightning `Trainer`, one per file."""

from gdtrain.callbacks.batch_norm import ExactBatchNorm
from gdtrain.callbacks.checkpoints import BestAndLast
from gdtrain.callbacks.convergence import Convergence
from gdtrain.callbacks.curvature import Curvature
from gdtrain.callbacks.curves import History, LossCurves
from gdtrain.callbacks.divergence import Divergence
from gdtrain.callbacks.gathering import GatherMicroBatches
from gdtrain.callbacks.interrupt import Interrupt
from gdtrain.callbacks.progress import ProgressLine

__all__ = [
    "BestAndLast",
    "Convergence",
    "Curvature",
    "Divergence",
    "ExactBatchNorm",
    "GatherMicroBatches",
    "History",
    "Interrupt",
    "LossCurves",
    "ProgressLine",
]
