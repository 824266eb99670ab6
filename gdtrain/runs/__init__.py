"""Runs from Python and from configurations."""

__all__: list[str] = []
