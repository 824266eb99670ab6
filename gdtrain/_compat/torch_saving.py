"""The functions of `torch._utils` that the pickle in a file of torch.save asks for by name."""

__all__ = ["REBUILD_PARAMETER", "REBUILD_TENSOR"]

REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"
REBUILD_PARAMETER = "torch._utils _rebuild_parameter"
