"""What of the `tools` extra a test file needs."""

import pytest


def needs(*modules: str) -> None:
    """Leave the file out where one of these cannot be imported."""
    for module in modules:
        pytest.importorskip(module, reason=f"needs {module}; make test-tools installs it and runs these tests")
