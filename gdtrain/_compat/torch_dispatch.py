"""Torch's mode that sees every operation: `torch.utils._python_dispatch`, which has no public name.

Needed to end the building of a model, or a pass through it, before it takes all memory.
"""

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["TorchDispatchMode"]
