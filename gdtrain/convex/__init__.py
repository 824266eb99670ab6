"""Certificates of optimality for convex problems."""

__all__: list[str] = []
