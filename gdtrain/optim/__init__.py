"""The three optimizers; they need nothing but torch."""

from gdtrain.optim.gd import GD
from gdtrain.optim.minibatch import MiniBatchSGD
from gdtrain.optim.sgd import SGD

__all__ = ["GD", "SGD", "MiniBatchSGD"]
