"""Settings that every test process shares. Nothing may be fetched, and SGLang imports only the models that we serve."""

import os

import pytest

from bdlora_perf.server_process import only_models

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for name, value in only_models(
    "llama", "qwen2", "qwen3", "mistral", "gemma", "phi3", "gemma2", "qwen3_moe", "mixtral", "qwen2_5_vl"
).items():
    os.environ.setdefault(name, value)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the tests marked full, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        full = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=full)
        items[:] = [item for item in items if item not in full]
