"""Small models and adapters for these tests. The tensors are so small that a second thread only costs time."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bdlora_perf.synthetic import make_adapter, make_model


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "llama", num_hidden_layers=2)


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A plain LoRA adapter of rank 8 on all linear modules, made by PEFT; not to be changed."""
    return make_adapter(tmp_path_factory.mktemp("lora") / "lora", model, rank=8)
