"""Runs compared, drawn and written."""

__all__: list[str] = []
