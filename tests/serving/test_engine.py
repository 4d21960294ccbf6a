"""`bdlora_sglang.Engine` against PEFT's own forward: every kind of adapter in one mixed batch, on every TP degree."""

import asyncio
import atexit
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bdlora_perf.collectives.count import Collective, count_collectives, traffic_elements
from bdlora_perf.synthetic.reference import PeftReference
from bdlora_sglang.adapter import Adapter
from bdlora_sglang.serving.cpu.cores import physical_cores, share_out
from bdlora_sglang.serving.sizes import format_bytes
from tests.serving.probe import HOLD_FILE, PROBE_FOLDER, ProbedScheduler
from tests.serving.zoo import CASES, CI_CASES, FREE, OVERRIDES, PROMPTS, SHARDED, Zoo

NEW_TOKENS = 8
LAYERS = 3


@dataclass
class Case:
    """A running engine whose ranks report on themselves to ``probe``, and what its requests should give."""

    engine: Any
    tp: int
    sharding: str
    adapters: dict[str, Path]
    reference: PeftReference
    probe: Path

    def generate(self, names: list[str | None], prompts: list[list[int]], new_tokens: int = NEW_TOKENS) -> list[Any]:
        return self.engine.generate(
            input_ids=prompts,
            lora_path=names,
            sampling_params={"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
            return_logprob=True,
        )

    def assert_equals_peft(self, name: str | None, path: Path | None, prompt: list[int]) -> None:
        (answer,) = self.generate([name], [prompt])
        assert answer["output_ids"] == self.reference.generate(prompt, path, NEW_TOKENS).tokens, name


def _case(zoo: Zoo, model: Path, tp: int, sharding: str, dtype: str, probe: Path) -> Iterator[Case]:
    from bdlora_sglang import Engine

    class ProbedEngine(Engine):
        scheduler_class = ProbedScheduler

    # One more, with as many blocks as ranks: the case that BD-LoRA is made for.
    adapters = {**zoo.adapters(model), "own": zoo.adapter(model, f"own-bd{tp}", rank=16, nblocks=tp, seed=50)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PROBE_FOLDER, str(probe))
        engine = ProbedEngine(
            model_path=str(model),
            tp_size=tp,
            lora_sharding=sharding,
            dtype=dtype,
            lora_paths=[f"{name}={path}" for name, path in adapters.items()],
            max_loras_per_batch=len(adapters) + 1,
            max_running_requests=64,
            skip_tokenizer_init=True,
            log_level="error",
        )
    try:
        yield Case(engine, tp, sharding, adapters, PeftReference(model, getattr(torch, dtype)), probe)
    finally:
        engine.shutdown()
        # SGLang would shut it down once more at exit, and log that to a stream which pytest has closed.
        atexit.unregister(engine.shutdown)


def _marked(case: tuple[str, int, str]) -> Any:
    marks = [] if case in CI_CASES else [pytest.mark.full]
    return pytest.param(case, id="{}-tp{}-{}".format(*case), marks=marks)


@pytest.fixture(scope="module", params=[_marked(case) for case in CASES])
def case(request: pytest.FixtureRequest, zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    architecture, tp, sharding = request.param
    model = zoo.model(architecture, **OVERRIDES.get(architecture, {}))
    yield from _case(zoo, model, tp, sharding, "float32", tmp_path_factory.mktemp("probe"))


@pytest.fixture(scope="module", params=[FREE, pytest.param(SHARDED, marks=pytest.mark.full)])
def bfloat16_case(request: pytest.FixtureRequest, zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    yield from _case(zoo, zoo.model("llama"), 2, request.param, "bfloat16", tmp_path_factory.mktemp("probe"))


def test_tokens_and_logprobs_equal_peft(case: Case) -> None:
    """One batch: every adapter and the base model, with prompts of several lengths."""
    requests = [(name, prompt) for prompt in PROMPTS for name in [None, *case.adapters]]
    answers = case.generate([name for name, _ in requests], [prompt for _, prompt in requests])
    for (name, prompt), answer in zip(requests, answers, strict=True):
        expected = case.reference.generate(prompt, case.adapters.get(name or ""), NEW_TOKENS)
        label = f"{name}, prompt of {len(prompt)}"
        assert answer["output_ids"] == expected.tokens, f"{label}: smallest logit gap {min(expected.gaps)}"
        logprobs = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
        error = max(abs(a - b) for a, b in zip(logprobs, expected.logprobs, strict=True))
        assert error < 1e-4, label


def test_adapters_change_the_logprobs(case: Case) -> None:
    """Else the test above would pass with LoRA left out."""
    prompt = PROMPTS[0]
    base = case.reference.generate(prompt, None, NEW_TOKENS).logprobs
    for name, path in case.adapters.items():
        adapted = case.reference.generate(prompt, path, NEW_TOKENS).logprobs
        assert max(abs(a - b) for a, b in zip(adapted, base, strict=True)) > 1e-2, name


def test_collectives(case: Case, tmp_path: Path) -> None:
    """Counted on every rank: communication-free LoRA adds none, fully sharded LoRA those of S-LoRA's formula."""
    # Prompts that no radix cache has seen, or the forwards would differ in length.
    mixed = [*list(case.adapters)[1::4], None] if case.sharding == FREE else ["own", "own", None, "own"]
    names: dict[str, list[str | None]] = {"base": [None] * 4, "lora": mixed}
    counts: dict[str, dict[int, Counter[Collective]]] = {}
    for kind, (label, adapters) in enumerate(names.items()):
        prompts = [[400 + kind, 17 + i, 3] for i in range(4)]
        case.engine.start_profile(
            output_dir=str(tmp_path / label), activities=["CPU"], record_shapes=True, with_stack=False
        )
        case.generate(adapters, prompts, new_tokens=3)
        case.engine.stop_profile()
        counts[label] = count_collectives(tmp_path / label)
    assert set(counts["base"]) == set(range(case.tp))
    for rank, base in counts["base"].items():
        # Three forwards; embedding, attention output and MLP output of each layer reduce once.
        reduced = Counter({c: n for c, n in base.items() if c.operation == "all_reduce"})
        assert sum(reduced.values()) == (3 * (1 + 2 * LAYERS) if case.tp > 1 else 0), (rank, reduced)
        added = counts["lora"][rank] - base
        assert base - counts["lora"][rank] == Counter()
        if case.sharding == FREE or case.tp == 1:
            assert added == Counter()
            continue
        # By hand, for rank 16 on N ranks and T tokens: qkv gathers (T, 3 * 16 / N), gate-up (T, 2 * 16 / N); o and
        # down reduce (T, 16) each.
        forwards = {c.shape[0]: n // (1 + 2 * LAYERS) for c, n in reduced.items()}
        expected: Counter[Collective] = Counter()
        for tokens, times in forwards.items():
            expected[Collective("all_gather", (tokens, 3 * 16 // case.tp))] += times * LAYERS
            expected[Collective("all_gather", (tokens, 2 * 16 // case.tp))] += times * LAYERS
            expected[Collective("all_reduce", (tokens, 16))] += 2 * times * LAYERS
        assert added == expected
        # 9 (N - 1) r S / N elements a layer over all seven modules, against the base model's 4 (N - 1) d S / N.
        tokens_in_all = sum(tokens * times for tokens, times in forwards.items())
        traffic = sum(traffic_elements(c, case.tp) * n for c, n in added.items())
        assert traffic == 9 * (case.tp - 1) * 16 * tokens_in_all * LAYERS / case.tp


def test_each_rank_reads_and_holds_one_nth(case: Case) -> None:
    """Of an adapter with as many blocks as ranks: of its file, and of the pool that SGLang's own classes would take."""
    whole = sum(tensor.nbytes for tensor in load_file(case.adapters["own"] / "adapter_model.safetensors").values())
    if case.sharding == SHARDED:
        assert_holds_one_nth_of_the_dense_factors(case)
        return
    intermediate_size = case.reference.config.intermediate_size
    for rank in range(case.tp):
        own = json.loads((case.probe / f"rank{rank}.json").read_text())["own"]
        if intermediate_size % (32 * case.tp) == 0:
            assert own["bytes_read"] * case.tp == own["host_bytes"] * case.tp == whole
            assert own["pool_bytes"] * case.tp == own["sglang_pool_bytes"]
        else:  # Shards of a padded layer do not end where blocks do, so a rank meets a part of one block more.
            assert own["bytes_read"] <= own["host_bytes"] <= own["pool_bytes"] < own["sglang_pool_bytes"]


def assert_holds_one_nth_of_the_dense_factors(case: Case) -> None:
    """Each rank one N-th; of a padded layer the last rank less, all together just the factors, and no padding."""
    dense = sum(16 * (m.in_features + m.out_features) * 4 for m in Adapter.open(case.adapters["own"]).modules.values())
    owns = [json.loads((case.probe / f"rank{rank}.json").read_text())["own"] for rank in range(case.tp)]
    assert sum(own["host_bytes"] for own in owns) == dense
    even = case.reference.config.intermediate_size % (32 * case.tp) == 0
    for own in owns:
        assert own["host_bytes"] * case.tp == dense or not even
        assert own["pool_bytes"] == own["host_bytes"]
        assert own["pool_bytes"] < own["sglang_pool_bytes"] or case.tp == 1


def test_a_dry_run_counts_the_same_slots(case: Case) -> None:
    """Of a model without weights, as on a GPU; where SGLang pads a model on a CPU it has other layers."""
    model = Path(case.engine.server_args.model_path)
    if case.sharding == SHARDED or case.reference.config.intermediate_size % (32 * case.tp):
        pytest.skip("a padded model, or slots by whole ranks")
    measured = [json.loads((case.probe / f"gpu_slots{rank}.json").read_text()) for rank in range(case.tp)]
    assert all(rank == measured[0] for rank in measured)
    flags = [word for name, path in case.adapters.items() for word in ("--adapters", f"{name}={path}")]
    flags += ["--max-loras-per-batch", str(measured[0]["slots"]), "--dtype", "float32"]
    words = [
        sys.executable,
        "-m",
        "bdlora_cli.main",
        "launch",
        "--dry-run",
        "--model",
        str(model),
        "--tp",
        str(case.tp),
        "--gpu-memory",
        "80",
        *flags,
    ]
    output = subprocess.run(words, capture_output=True, text=True, timeout=400)
    assert output.returncode == 0, output.stderr[-2000:]
    assert f"({measured[0]['slots'] * measured[0]['slot_bytes']} bytes)" in output.stdout
    layers, heads = case.reference.config.num_hidden_layers, case.reference.config.num_key_value_heads
    token_bytes = layers * max(1, heads // case.tp) * 2 * case.reference.config.head_dim * 4
    assert f"KV cache: {format_bytes(token_bytes)} a token." in output.stdout
    assert "of scratch for batches of" in output.stdout
    assert "tokens of KV cache. With half as many" in output.stdout


def test_each_rank_has_its_cores(case: Case) -> None:
    shares = share_out(physical_cores(os.sched_getaffinity(0)), case.tp)
    for rank, share in enumerate(shares):
        own = json.loads((case.probe / f"cores{rank}.json").read_text())
        assert own == {"threads": len(share), "affinities": [share]}


def test_adapter_from_tensors(case: Case) -> None:
    path = case.adapters["bd4-r8"]
    config = json.loads((path / "adapter_config.json").read_text())
    tensors = load_file(path / "adapter_model.safetensors")
    result = case.engine.load_lora_adapter_from_tensors("from-tensors", tensors, config)
    assert result.success, result.error_message
    case.assert_equals_peft("from-tensors", path, PROMPTS[0])
    assert case.engine.unload_lora_adapter("from-tensors").success


def test_requests_go_on_while_an_adapter_is_read(case: Case) -> None:
    """Whatever the time that it takes; before, the scheduler of every rank read it itself, and served nobody."""
    from sglang.srt.managers.io_struct import LoadLoRAAdapterReqInput

    hold, path = case.probe / HOLD_FILE, case.adapters["bd4-r8"]

    async def load_and_generate() -> tuple[list[Any], Any]:
        request = LoadLoRAAdapterReqInput(lora_name=HOLD_FILE, lora_path=str(path))
        load = asyncio.ensure_future(case.engine.tokenizer_manager.load_lora_adapter(request))
        await asyncio.sleep(0)
        answers = case.engine.async_generate(
            input_ids=[PROMPTS[1]] * 2,
            lora_path=[None, "bd4-r8"],
            sampling_params={"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        )
        answered = await asyncio.wait_for(answers, 60)
        assert not load.done()
        hold.unlink()
        return answered, await asyncio.wait_for(load, 60)

    hold.touch()
    try:
        answers, result = case.engine.loop.run_until_complete(load_and_generate())
    finally:
        hold.unlink(missing_ok=True)
    for answer, own in zip(answers, (None, path), strict=True):
        assert answer["output_ids"] == case.reference.generate(PROMPTS[1], own, NEW_TOKENS).tokens
    assert result.success and HOLD_FILE in result.loaded_adapters
    case.assert_equals_peft(HOLD_FILE, path, PROMPTS[0])
    assert case.engine.unload_lora_adapter(HOLD_FILE).success


def test_bad_tensors_are_refused_by_name(case: Case) -> None:
    path = case.adapters["bd4-r8"]
    tensors = load_file(path / "adapter_model.safetensors")
    config = json.loads((path / "adapter_config.json").read_text())
    name = next(name for name in tensors if "layers.1.self_attn.o_proj.lora_A" in name)
    tensors[name] = tensors[name][:, :-1].contiguous()
    result = case.engine.load_lora_adapter_from_tensors("bad", tensors, config)
    assert not result.success
    assert name in result.error_message
    assert set(result.loaded_adapters) == set(case.adapters)
    case.assert_equals_peft("bd4-r8", path, PROMPTS[1])


def test_bfloat16_adapter_on_a_float32_model(case: Case, zoo: Zoo, tmp_path: Path) -> None:
    model = Path(case.engine.server_args.model_path)
    path = zoo.adapter(model, "bf16", rank=8, nblocks=2, dtype=torch.bfloat16, seed=9)
    assert case.engine.load_lora_adapter("bf16", str(path)).success
    case.assert_equals_peft("bf16", path, PROMPTS[0])
    assert case.engine.unload_lora_adapter("bf16").success


def test_nothing_of_sglang_is_changed_by_serving(case: Case) -> None:
    """The last one on each engine: requests, loads and unloads have run by now."""
    for rank in range(case.tp):
        assert json.loads((case.probe / f"changed{rank}.json").read_text()) == []


def test_decode_steps_are_replayed(case: Case) -> None:
    """After all of the above: batches of one request and of many, with adapters and without."""
    for rank in range(case.tp):
        assert json.loads((case.probe / f"replayed{rank}.json").read_text()) >= 3


def test_bfloat16_is_as_close_as_sglang_is(bfloat16_case: Case, record_property: Any) -> None:
    """SGLang's own order of arithmetic differs from PEFT's; LoRA must not add to that more than its own rounding."""
    errors: dict[str | None, float] = {}
    for name in [None, *bfloat16_case.adapters]:
        path = bfloat16_case.adapters.get(name or "")
        squares = []
        for prompt, answer in zip(PROMPTS, bfloat16_case.generate([name] * len(PROMPTS), list(PROMPTS)), strict=True):
            expected = bfloat16_case.reference.logprobs(prompt, path, answer["output_ids"])
            got = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
            squares += [(a - b) ** 2 for a, b in zip(got, expected, strict=True)]
        errors[name] = (sum(squares) / len(squares)) ** 0.5
    measured = {str(name): round(error, 4) for name, error in errors.items()}
    record_property("rms_logprob_error", measured)
    print("RMS log-probability error in bfloat16:", measured)
    base = errors.pop(None)
    assert base > 0
    assert max(errors.values()) < 4 * base, errors
