"""The Lightning module over the descent, and what it needs of Lightning."""

__all__: list[str] = []
