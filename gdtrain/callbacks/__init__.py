"""Callbacks for a Lightning `Trainer` with a `SupervisedModule`, one per file."""

from gdtrain.callbacks.checkpoints import BestAndLast
from gdtrain.callbacks.curves import History, LossCurves
from gdtrain.callbacks.divergence import Divergence
from gdtrain.callbacks.interrupt import Interrupt
from gdtrain.callbacks.progress import ProgressLine

__all__ = ["BestAndLast", "Divergence", "History", "Interrupt", "LossCurves", "ProgressLine"]
