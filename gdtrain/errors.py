"""Errors whose text is for the user. Imports nothing: a typo is told at once."""

__all__ = ["ConfigurationError"]


class ConfigurationError(ValueError):
    """The user's configuration is wrong; the message is for the user."""
