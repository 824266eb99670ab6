"""Callbacks for a Lightning `Trainer`."""

from gdtrain.callbacks.batch_norm import ExactBatchNorm
from gdtrain.callbacks.checkpoints import BestAndLast
from gdtrain.callbacks.convergence import Convergence
from gdtrain.callbacks.curvature import Curvature
from gdtrain.callbacks.curves import History, LossCurves
from gdtrain.callbacks.divergence import Divergence
from gdtrain.callbacks.explain import ExplainUpdate
from gdtrain.callbacks.gathering import GatherMicroBatches
from gdtrain.callbacks.gradient_noise import GradientNoise
from gdtrain.callbacks.instrument import Instrument
from gdtrain.callbacks.interrupt import Interrupt
from gdtrain.callbacks.progress import ProgressLine
from gdtrain.callbacks.step_test import StepTest
from gdtrain.callbacks.trajectory import Trajectory
from gdtrain.callbacks.vectors import (
    Distance,
    GradientCosine,
    GradientNorms,
    Histograms,
    UpdateRatio,
)

__all__ = [
    "BestAndLast",
    "Convergence",
    "Curvature",
    "Distance",
    "Divergence",
    "ExactBatchNorm",
    "ExplainUpdate",
    "GatherMicroBatches",
    "GradientCosine",
    "GradientNoise",
    "GradientNorms",
    "Histograms",
    "History",
    "Instrument",
    "Interrupt",
    "LossCurves",
    "ProgressLine",
    "StepTest",
    "Trajectory",
    "UpdateRatio",
]
