"""Models, sized from the data: each takes `input_shape` and `num_outputs` first."""

from gdtrain.models.cnn import CNN, resnet18
from gdtrain.models.initialisation import initialise_
from gdtrain.models.linear import Linear
from gdtrain.models.mlp import MLP
from gdtrain.models.normalisation import exact_batch_norm_

__all__ = ["CNN", "MLP", "Linear", "exact_batch_norm_", "initialise_", "resnet18"]
