"""Cases of parametrized tests."""

import pytest


def slow(*values):
    """A case that `make test` leaves to `make test-all`."""
    return pytest.param(*values, marks=pytest.mark.slow)
