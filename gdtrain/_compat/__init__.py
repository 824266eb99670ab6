"""What gdtrain touches of other libraries that they call private: one file for each library."""

__all__: list[str] = []
