"""Settings for the tests of the backends."""

import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _without_the_warning_of_many_layers() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "layer .* of parameter group")
        yield
