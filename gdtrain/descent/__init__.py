"""A run without Lightning: its state, its trials, why it stops."""

__all__: list[str] = []
