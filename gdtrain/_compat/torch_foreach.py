"""`torch._foreach_*`: one call for a list of tensors, a loop in C++ on CPU, one kernel on a GPU.

The trailing underscore means in place, as in torch.
"""

import torch

__all__ = [
    "add",
    "add_",
    "copy_",
    "div_",
    "lerp",
    "lerp_",
    "mul",
    "mul_",
    "neg",
    "norm",
    "sub",
    "sub_",
]

add, add_ = torch._foreach_add, torch._foreach_add_
copy_ = torch._foreach_copy_
div_ = torch._foreach_div_
lerp, lerp_ = torch._foreach_lerp, torch._foreach_lerp_
mul, mul_ = torch._foreach_mul, torch._foreach_mul_
neg = torch._foreach_neg
norm = torch._foreach_norm
sub, sub_ = torch._foreach_sub, torch._foreach_sub_
