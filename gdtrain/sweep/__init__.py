"""How K updates are done at once."""

from gdtrain.sweep.choice import ENGINES, EngineName, choose
from gdtrain.sweep.compiled import Compiled
from gdtrain.sweep.eager import Eager
from gdtrain.sweep.engine import Engine, NotApplicableError
from gdtrain.sweep.native import Native

__all__ = [
    "ENGINES",
    "Compiled",
    "Eager",
    "Engine",
    "EngineName",
    "Native",
    "NotApplicableError",
    "choose",
]
