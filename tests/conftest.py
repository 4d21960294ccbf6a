"""Settings that every test process shares. Nothing may be fetched, and SGLang imports only the models that we serve."""

import importlib.util
import os
from pathlib import Path

import pytest

_SERVED_MODELS = {"llama", "qwen2", "qwen3", "mistral", "gemma", "registry", "utils"}


def _other_models() -> str:
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        return ""
    models = (Path(spec.origin).parent / "srt" / "models").glob("*.py")
    return ",".join(sorted(path.stem for path in models if path.stem not in _SERVED_MODELS | {"__init__"}))


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# SGLang imports each of its 200 model files in every process: half of a start on two cores.
os.environ.setdefault("SGLANG_DISABLED_MODEL_ARCHS", _other_models())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the tests marked full, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        full = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=full)
        items[:] = [item for item in items if item not in full]
