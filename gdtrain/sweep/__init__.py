"""How K updates are done at once."""

from gdtrain.sweep import eager

__all__ = ["eager"]
