"""Small models and adapters for these tests."""

from pathlib import Path

import pytest

from bdlora_perf.synthetic import make_adapter, make_model
from tests.threads import one_thread

__all__ = ["lora", "model", "one_thread"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "llama", num_hidden_layers=2)


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A plain LoRA adapter of rank 8 on all linear modules, made by PEFT; not to be changed."""
    return make_adapter(tmp_path_factory.mktemp("lora") / "lora", model, rank=8)
