"""How K updates are done at once."""

from gdtrain.engines.choice import ENGINES, EngineName, choose
from gdtrain.engines.compiled import Compiled
from gdtrain.engines.eager import Eager
from gdtrain.engines.engine import Engine, NotApplicableError
from gdtrain.engines.native.engine import Native

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
