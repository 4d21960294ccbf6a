"""Any TP degree that the heads allow on a GPU, on the CPU too; any other is refused before a process starts."""

import atexit
import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from bdlora_perf.synthetic.reference import PeftReference
from bdlora_sglang.errors import BDLoRAError
from tests.serving.zoo import PROMPTS, Zoo

NEW_TOKENS = 8
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"rank": 6},
    "plain-kv": {"rank": 4, "target_modules": ["k_proj", "v_proj"]},
    "bd2": {"rank": 8, "nblocks": 2},
    "bd4": {"rank": 8, "nblocks": 4},
}
# Architecture, heads, KV heads and TP degree. Two ranks a KV head; one head on all ranks; three ranks a head.
REPLICATED = [
    pytest.param(("llama", 8, 2, 4), id="llama-8-2-tp4", marks=pytest.mark.full),
    pytest.param(("qwen3", 4, 1, 2), id="qwen3-4-1-tp2"),
    pytest.param(("mistral", 12, 2, 6), id="mistral-12-2-tp6", marks=pytest.mark.full),
]


@dataclass
class Case:
    engine: Any
    adapters: dict[str, Path]
    reference: PeftReference


@pytest.fixture(scope="module", params=REPLICATED)
def case(request: pytest.FixtureRequest, zoo: Zoo) -> Iterator[Case]:
    from bdlora_sglang import Engine

    architecture, heads, kv_heads, tp = request.param
    model = zoo.model(architecture, num_attention_heads=heads, num_key_value_heads=kv_heads)
    adapters = {name: zoo.adapter(model, name, seed=i, **spec) for i, (name, spec) in enumerate(ADAPTERS.items())}
    engine = Engine(
        model_path=str(model),
        tp_size=tp,
        dtype="float32",
        lora_paths=[f"{name}={path}" for name, path in adapters.items()],
        max_loras_per_batch=len(adapters) + 1,
        max_running_requests=32,
        skip_tokenizer_init=True,
        log_level="error",
    )
    try:
        yield Case(engine, adapters, PeftReference(model))
    finally:
        engine.shutdown()
        # SGLang would shut it down once more at exit, and log that to a stream which pytest has closed.
        atexit.unregister(engine.shutdown)


def test_replicated_kv_heads_equal_peft(case: Case) -> None:
    """One batch of the base model and every adapter: tokens, and log-probabilities within 1e-4."""
    requests = [(name, prompt) for prompt in PROMPTS for name in [None, *case.adapters]]
    answers = case.engine.generate(
        input_ids=[prompt for _, prompt in requests],
        lora_path=[name for name, _ in requests],
        sampling_params={"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        return_logprob=True,
    )
    for (name, prompt), answer in zip(requests, answers, strict=True):
        expected = case.reference.generate(prompt, case.adapters.get(name or ""), NEW_TOKENS)
        assert answer["output_ids"] == expected.tokens, f"{name}: smallest logit gap {min(expected.gaps)}"
        logprobs = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
        assert max(abs(a - b) for a, b in zip(logprobs, expected.logprobs, strict=True)) < 1e-4, name


@pytest.mark.parametrize(
    ("tp", "sizes", "expected"),
    [
        (2, (9, 3, None), "a divisor of the model's 9 attention heads (3 KV heads): 1, 3 or 9"),
        (6, (12, 4, None), "a divisor or a multiple of the model's 4 KV heads (12 attention heads): 1, 2, 4 or 12"),
        (8, (8, 2, 100), "a divisor of the model's intermediate size 100 (8 attention heads): 1, 2 or 4"),
        (2, (1, 1, 64), "a divisor of the model's 1 attention heads (1 KV heads): 1"),
        (16, (8, 2, 64), "a divisor of the model's 8 attention heads (2 KV heads): 1, 2, 4 or 8"),
    ],
)
def test_what_a_degree_must_be(tp: int, sizes: tuple[int, int, int | None], expected: str) -> None:
    from bdlora_sglang.serving.checks import ModelSizes, check_tp

    with pytest.raises(BDLoRAError) as raised:
        check_tp(tp, ModelSizes(*sizes))
    assert str(raised.value) == f"--tp: found {tp}, expected {expected}"


def test_the_check_is_the_rule_of_sglangs_layers() -> None:
    """`QKVParallelLinear` divides heads, and divides or replicates KV heads; its constructor refuses the rest."""
    from sglang.srt.distributed import divide

    from bdlora_sglang.serving.checks import ModelSizes

    def sglang_splits(heads: int, kv_heads: int, intermediate: int, tp: int) -> bool:
        try:
            divide(heads, tp)
            divide(tp, kv_heads) if tp >= kv_heads else divide(kv_heads, tp)
            divide(intermediate, tp)
        except AssertionError:
            return False
        return True

    for heads, groups, intermediate, tp in itertools.product(range(1, 25), range(1, 9), (48, 50, 96), range(1, 17)):
        if heads % groups == 0:
            sizes = (heads, heads // groups, intermediate)
            assert ModelSizes(*sizes).allows(tp) == sglang_splits(*sizes, tp), (sizes, tp)


def _config(**fields: Any) -> Any:
    return SimpleNamespace(**{"architectures": ["SomeForCausalLM"], **fields})


def test_sizes_are_found_in_configs_of_all_kinds() -> None:
    from transformers import AutoConfig

    from bdlora_sglang.serving.checks import ModelSizes, model_sizes

    text = {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 64}
    assert model_sizes(AutoConfig.for_model("llama", **text)) == ModelSizes(8, 2, 64)
    vision = {"model_type": "siglip_vision_model", "num_attention_heads": 5}
    multimodal = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, architectures=["Gemma3"])
    assert model_sizes(multimodal) == ModelSizes(8, 2, 64)
    assert model_sizes(_config(num_attention_heads=12, intermediate_size=100)) == ModelSizes(12, 12, 100)
    assert model_sizes(_config(num_attention_heads=12, num_key_value_heads=None)) == ModelSizes(12, 12)
    # Experts are split by rules of their own; models without attention have nothing to check.
    assert model_sizes(_config(**text, num_local_experts=4)) == ModelSizes(8, 2)
    assert model_sizes(_config(hidden_size=64, num_attention_heads=None)) is None
    assert model_sizes(_config(num_attention_heads=[4, 8])) is None


@pytest.fixture
def nine_heads(zoo: Zoo) -> Path:
    return zoo.model("llama", hidden_size=72, intermediate_size=288, num_attention_heads=9, num_key_value_heads=3)


NINE_HEADS = "--tp: found 2, expected a divisor of the model's 9 attention heads (3 KV heads): 1, 3 or 9"


def test_engine_refuses_before_it_starts_a_process(nine_heads: Path) -> None:
    from sglang.srt.server_args import ServerArgs

    from bdlora_sglang import Engine
    from bdlora_sglang.serving.engine import platform_defaults

    before = set(psutil.Process().children(recursive=True))
    start = time.perf_counter()
    arguments = {"model_path": str(nine_heads), "tp_size": 2}
    for given in (arguments, {"server_args": ServerArgs(**{**platform_defaults(2, 1), **arguments})}):
        with pytest.raises(BDLoRAError) as raised:
            Engine(**given)
        assert str(raised.value) == NINE_HEADS
    assert time.perf_counter() - start < 5
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tp", "2"], NINE_HEADS),
        (["--tp", "3", "--grammar-backend", "llguidance"], "--grammar-backend: found 'llguidance', expected xgrammar"),
    ],
    ids=["heads", "grammar"],
)
def test_launch_ends_with_the_message_and_1(nine_heads: Path, flags: list[str], message: str) -> None:
    command = [sys.executable, "-m", "bdlora_cli.main", "launch", "--model", str(nine_heads), *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith(f"bdlora: {message}")


def test_a_model_that_cannot_be_read_is_refused_with_sglangs_reason(tmp_path: Path) -> None:
    from bdlora_sglang import Engine

    with pytest.raises(BDLoRAError, match="SGLang refuses its arguments: Unrecognized model in"):
        Engine(model_path=str(tmp_path), tp_size=7)
