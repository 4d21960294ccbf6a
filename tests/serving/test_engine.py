"""`bdlora_sglang.Engine`: memory, adapters from tensors, and that SGLang stays as it is."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bdlora_perf.reference import PeftReference
from tests.serving.probe import PROBE_FOLDER
from tests.serving.zoo import PROMPTS, Zoo

NEW_TOKENS = 6


class Probed:
    """An engine whose ranks report on themselves, serving one adapter with as many blocks as ranks."""

    def __init__(self, engine: Any, tp: int, folder: Path, model: Path, adapter: Path) -> None:
        self.engine, self.tp, self.folder, self.adapter = engine, tp, folder, adapter
        self.reference = PeftReference(model)

    def measurements(self) -> list[dict[str, Any]]:
        return [json.loads((self.folder / f"rank{rank}.json").read_text()) for rank in range(self.tp)]

    def tokens(self, name: str | None, prompt: list[int]) -> list[int]:
        answer = self.engine.generate(
            input_ids=[prompt],
            lora_path=[name],
            sampling_params={"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        )
        return answer[0]["output_ids"]


@pytest.fixture(scope="module", params=[2, 4], ids=lambda tp: f"tp{tp}")
def probed(request: pytest.FixtureRequest, zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probed]:
    from bdlora_sglang import Engine
    from tests.serving.probe import ProbedScheduler

    class ProbedEngine(Engine):
        scheduler_class = ProbedScheduler

    tp = request.param
    model = zoo.model("llama")
    adapter = zoo.adapter(model, f"own-bd{tp}", rank=16, nblocks=tp, seed=50)
    folder = tmp_path_factory.mktemp(f"probe-tp{tp}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PROBE_FOLDER, str(folder))
        engine = ProbedEngine(
            model_path=str(model),
            tp_size=tp,
            dtype="float32",
            lora_paths=[f"own={adapter}"],
            max_loras_per_batch=3,
            skip_tokenizer_init=True,
            log_level="error",
        )
        try:
            yield Probed(engine, tp, folder, model, adapter)
        finally:
            engine.shutdown()


def test_pool_takes_one_nth_of_sglangs_own(probed: Probed) -> None:
    for measured in probed.measurements():
        assert measured["bdlora_pool_bytes"] * probed.tp == measured["sglang_pool_bytes"]


def test_each_rank_reads_and_holds_one_nth(probed: Probed) -> None:
    whole = sum(tensor.nbytes for tensor in load_file(probed.adapter / "adapter_model.safetensors").values())
    for measured in probed.measurements():
        own = measured["adapters"]["own"]
        assert own["bytes_read"] * probed.tp == whole
        assert own["host_bytes"] * probed.tp == whole


def test_adapter_from_tensors(probed: Probed, zoo: Zoo) -> None:
    tensors = load_file(probed.adapter / "adapter_model.safetensors")
    config = json.loads((probed.adapter / "adapter_config.json").read_text())
    result = probed.engine.load_lora_adapter_from_tensors("from-tensors", tensors, config)
    assert result.success, result.error_message
    expected = probed.reference.generate(PROMPTS[0], probed.adapter, NEW_TOKENS).tokens
    assert probed.tokens("from-tensors", PROMPTS[0]) == expected
    assert probed.engine.unload_lora_adapter("from-tensors").success


def test_bad_tensors_are_refused_by_name(probed: Probed) -> None:
    tensors = load_file(probed.adapter / "adapter_model.safetensors")
    config = json.loads((probed.adapter / "adapter_config.json").read_text())
    name = next(name for name in tensors if "layers.1.self_attn.o_proj.lora_A" in name)
    tensors[name] = tensors[name][:, :-1].contiguous()
    result = probed.engine.load_lora_adapter_from_tensors("bad", tensors, config)
    assert not result.success
    assert name in result.error_message
    assert "own" in result.loaded_adapters and "bad" not in result.loaded_adapters
    expected = probed.reference.generate(PROMPTS[1], probed.adapter, NEW_TOKENS).tokens
    assert probed.tokens("own", PROMPTS[1]) == expected


def test_adapter_that_does_not_fit_a_slot_names_the_flag(probed: Probed, zoo: Zoo) -> None:
    plain = zoo.adapter(zoo.model("llama"), "plain-r16", rank=16, seed=1)
    result = probed.engine.load_lora_adapter("plain", str(plain))
    assert not result.success
    assert "local rank 16" in result.error_message and "--max-local-rank 16" in result.error_message


def test_a_pinned_adapter_may_not_take_the_last_slots(probed: Probed, zoo: Zoo) -> None:
    for index in range(2):
        result = probed.engine.load_lora_adapter(f"pinned{index}", str(probed.adapter), pinned=True)
        assert result.success, result.error_message
    result = probed.engine.load_lora_adapter("pinned2", str(probed.adapter), pinned=True)
    assert not result.success
    assert "pin" in result.error_message
    # Two of three slots are pinned; every other adapter and the base model share the third.
    for name in ("own", None, "pinned0", "own", "pinned1", None):
        path = probed.adapter if name else None
        assert probed.tokens(name, PROMPTS[2]) == probed.reference.generate(PROMPTS[2], path, NEW_TOKENS).tokens
    for index in range(2):
        assert probed.engine.unload_lora_adapter(f"pinned{index}").success


def test_bfloat16_adapter_on_a_float32_model(probed: Probed, zoo: Zoo) -> None:
    path = zoo.adapter(
        zoo.model("llama"), f"bf16-bd{probed.tp}", rank=8, nblocks=probed.tp, dtype=torch.bfloat16, seed=9
    )
    assert probed.engine.load_lora_adapter("bf16", str(path)).success
    assert probed.tokens("bf16", PROMPTS[0]) == probed.reference.generate(PROMPTS[0], path, NEW_TOKENS).tokens
    assert probed.engine.unload_lora_adapter("bf16").success


def test_nothing_of_sglang_is_changed_by_serving(probed: Probed) -> None:
    """The last of this module: requests and loads have run by now."""
    for rank in range(probed.tp):
        assert json.loads((probed.folder / f"changed{rank}.json").read_text()) == []
