"""The engine with the Triton kernels, interpreted: the path that a GPU takes, with the tables of its CUDA graphs."""

import atexit
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bdlora_perf.synthetic.reference import PeftReference
from tests.serving.graph_tables import MAX_PREFILL_TOKENS, TABLES_FILE, GraphTablesScheduler
from tests.serving.zoo import FREE, SHARDED, Zoo

# The interpreter takes seconds for what a GPU does in microseconds.
NEW_TOKENS = 2
PROMPT = [11, 23, 5]
# "ends": on the embedding, which is looked up, and on the output head.
GIVEN, LATE = ("plain-r5-rslora", "bd3-r12", "bd8-r16", "ends"), "plain-r16"


@pytest.fixture(params=[FREE, pytest.param(SHARDED, marks=pytest.mark.full)])
def sharding(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def engine(zoo: Zoo, tmp_path: Path, sharding: str) -> Iterator[Any]:
    from bdlora_sglang import Engine

    class GraphTablesEngine(Engine):
        scheduler_class = GraphTablesScheduler

    model = zoo.model("llama", num_hidden_layers=1)
    adapters = _adapters(zoo, model, sharding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv(TABLES_FILE, str(tmp_path / "tables"))
        engine = GraphTablesEngine(
            model_path=str(model),
            tp_size=1 if sharding == FREE else 2,
            lora_sharding=sharding,
            dtype="float32",
            lora_paths=[f"{name}={adapters[name]}" for name in GIVEN],
            max_lora_rank=16,
            max_loras_per_batch=3,  # fewer slots than adapters: slots are written again
            skip_tokenizer_init=True,
            log_level="error",
        )
    yield engine
    engine.shutdown()
    atexit.unregister(engine.shutdown)


def _adapters(zoo: Zoo, model: Path, sharding: str) -> dict[str, Path]:
    own = {"rank": 6, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}
    if sharding == SHARDED:  # of linear layers alone; two ranks do not divide this rank
        own = {"rank": 3, "target_modules": ["q_proj", "down_proj"]}
    ends = zoo.adapter(model, f"ends-{sharding}", seed=70, **own)
    return {**zoo.adapters(model, but={"bd2-v-down-layer1", "bd4-patterns-rslora"}), "ends": ends}


def test_tokens_equal_peft(engine: Any, zoo: Zoo, tmp_path: Path, sharding: str) -> None:
    """Adapters of every kind and the base model, batch after batch in the same tables; one adapter comes later. Fully
    sharded, two ranks exchange what the kernels have shrunk."""
    model = zoo.model("llama", num_hidden_layers=1)
    adapters = _adapters(zoo, model, sharding)
    reference = PeftReference(model)
    assert engine.load_lora_adapter(LATE, str(adapters[LATE])).success
    for names in ([None, *GIVEN, LATE], [LATE, "bd3-r12"], ["bd8-r16", "ends"], [None, "ends"]):
        answers = engine.generate(
            input_ids=[PROMPT] * len(names),
            lora_path=names,
            sampling_params={"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
            return_logprob=True,
        )
        for name, answer in zip(names, answers, strict=True):
            expected = reference.generate(PROMPT, adapters.get(name or ""), NEW_TOKENS)
            assert answer["output_ids"] == expected.tokens, name
            logprobs = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
            assert max(abs(a - b) for a, b in zip(logprobs, expected.logprobs, strict=True)) < 1e-4, name
    assert len(PROMPT) * 3 > MAX_PREFILL_TOKENS >= len(PROMPT) * 2
    assert set((tmp_path / "tables").read_text().split()) == {"decode", "prefill", "eager"}
