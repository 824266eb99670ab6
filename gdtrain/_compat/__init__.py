"""What gdtrain touches of other libraries that they call private; tests/_compat says what for."""

__all__: list[str] = []
