"""Errors whose text is for the user. Imports nothing: a typo is told at once."""

__all__ = ["ConfigurationError"]


class ConfigurationError(ValueError):
    """The user's configuration is wrong; the message is for the user.

    Example:
        >>> raise ConfigurationError("optimizer.lr must be > 0.")
        Traceback (most recent call last):
        ...
        gdtrain.errors.ConfigurationError: optimizer.lr must be > 0.
    """
