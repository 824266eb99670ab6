"""Linear models and MLPs on the CPU, with a backward pass written by hand."""

__all__: list[str] = []
