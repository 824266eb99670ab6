"""What can be asked about a run or a model."""

__all__: list[str] = []
