import os
from collections.abc import Iterator

import pytest

from tests.serving.zoo import Zoo


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture
def same_environment() -> Iterator[None]:
    """Choosing the CPU platform sets environment variables, for the children of a real launch."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
