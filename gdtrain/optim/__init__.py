"""The three optimizers; they need nothing but torch.

They take the place of `torch.optim.SGD`, whose arguments, numbers and states they share. They are
no instances of it (`higher` needs `register_optim`), and refuse NaN and infinite hyperparameters
besides what it refuses. Under the wrappers of Fabric, accelerate and Lightning, which hand on no
`num_samples` or count each call as a step, call `gather(num_samples=m)`, and `step()` where it
returns True: docs/drop-in.md.
"""

from gdtrain.optim.gd import GD
from gdtrain.optim.minibatch import MiniBatchSGD
from gdtrain.optim.sgd import SGD

__all__ = ["GD", "SGD", "MiniBatchSGD"]
