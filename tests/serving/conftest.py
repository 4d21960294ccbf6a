from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.serving.zoo import Zoo


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))


@contextmanager
def running_engine(model: Path, tp: int, adapters: dict[str, Path], **options: Any) -> Iterator[Any]:
    """``bdlora_sglang.Engine`` with the given adapters, on token ids, shut down at the end."""
    from bdlora_sglang import Engine

    engine = Engine(
        model_path=str(model),
        tp_size=tp,
        lora_paths=[f"{name}={path}" for name, path in adapters.items()],
        skip_tokenizer_init=True,
        log_level="error",
        max_running_requests=64,
        **{"dtype": "float32", "max_loras_per_batch": len(adapters) + 1, **options},
    )
    try:
        yield engine
    finally:
        engine.shutdown()


@pytest.fixture
def start_engine() -> Callable[..., Any]:
    return running_engine
