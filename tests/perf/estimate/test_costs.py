"""Bytes, FLOPs and collectives: against figures worked out by hand, PEFT's adapters and PyTorch's FLOP counter."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from bdlora_perf.estimate.lora_cost import BASE, Serving, bd_lora, csgmv, lora_work, replicated, s_lora
from bdlora_perf.estimate.model_shape import SHAPES, ModelShape, load_shape
from bdlora_perf.estimate.roofline import base_kernels
from bdlora_perf.estimate.traffic import Batch
from bdlora_perf.synthetic import make_adapter, make_model
from bdlora_sglang.convert import inspect_adapter
from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.model_names import MODEL_NAMES

# q 8 -> 8, k and v 8 -> 4, o 8 -> 8, gate and up 8 -> 16, down 16 -> 8.
TINY = ModelShape("tiny", hidden=8, layers=1, heads=4, kv_heads=2, head_dim=2, intermediate=16, vocabulary=32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("estimate") / "model")


# Elements of A + B on one of two ranks, r = 4, module by module: q, k, v, o, gate, up, down.
BY_HAND = {
    # Local rank 2: A 2x8, B 4x2 | A 2x8, B 2x2 twice | A 2x4, B 8x2 | A 2x8, B 8x2 twice | A 2x8, B 8x2
    "bd-2-blocks": (bd_lora(4, 2), (16 + 8) + 2 * (16 + 4) + (8 + 16) + 2 * (16 + 16) + (16 + 16)),
    # Two blocks of rank 1 a rank: A as before, B a column for each block.
    "bd-4-blocks": (bd_lora(4, 4), (16 + 4) + 2 * (16 + 2) + (4 + 16) + 2 * (16 + 8) + (8 + 16)),
    "replicated": (replicated(4), (32 + 16) + 2 * (32 + 8) + (16 + 32) + 2 * (32 + 32) + (32 + 32)),
    "csgmv": (csgmv(4), (32 + 16) + 2 * (32 + 8) + (16 + 32) + 2 * (32 + 32) + (32 + 32)),
    "s-lora": (s_lora(4), 4 * (16 + 2 * 12 + 16 + 2 * 24 + 24) // 2),
}


@pytest.mark.parametrize(("serving", "elements"), BY_HAND.values(), ids=BY_HAND)
def test_bytes_and_flops_of_a_tiny_model(serving: Serving, elements: int) -> None:
    assert serving.adapter_bytes(TINY, tp=2) == 2 * elements
    kernels, _ = lora_work(TINY, serving, tp=2, tokens=3, distinct=2)
    assert sum(kernel.flops for kernel in kernels) == 2 * 3 * elements


def test_memory_traffic_of_the_qkv_kernels() -> None:
    (shrink, expand, *_), _ = lora_work(TINY, bd_lora(4, 2), tp=2, tokens=3, distinct=2)
    # Two adapters' A of 3 modules x 2x8; each of 3 tokens reads 8 inputs and writes 3 x 2 values, 2 bytes each.
    assert shrink.num_bytes == 2 * 48 * 2 + 3 * (8 + 6) * 2
    # B of 4x2, 2x2, 2x2; each token reads the 6 values, reads and writes 4 + 2 + 2 outputs.
    assert expand.num_bytes == 2 * 16 * 2 + 3 * (6 + 2 * 8) * 2


def test_the_base_model_has_no_lora() -> None:
    assert BASE.adapter_bytes(TINY, 2) == 0
    assert lora_work(TINY, BASE, 2, tokens=3, distinct=1) == ([], [])


@pytest.mark.parametrize("nblocks", [None, 2, 4, 8], ids=["plain", "2-blocks", "4-blocks", "8-blocks"])
def test_peft_adapters_have_these_parameters_and_bytes(model: Path, tmp_path: Path, nblocks: int | None) -> None:
    summary = inspect_adapter(make_adapter(tmp_path / "adapter", model, rank=16, nblocks=nblocks), tp_sizes=(1, 2, 4))
    shape = load_shape(str(model))
    serving = bd_lora(16, nblocks or 1)
    assert serving.parameters(shape) == summary.num_parameters
    for size in summary.bytes_per_gpu:  # these adapters are float32, the estimate counts bfloat16
        assert 2 * serving.adapter_bytes(shape, size.tp_size) == size.communication_free
        assert 2 * replicated(16).adapter_bytes(shape, size.tp_size) == size.replicated
        assert 2 * s_lora(16).adapter_bytes(shape, size.tp_size) == size.fully_sharded


def test_weights_and_flops_of_the_base_model_are_those_of_transformers(model: Path) -> None:
    shape = load_shape(str(model))
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    matrices = sum(weight.numel() for weight in network.parameters() if weight.ndim == 2)
    assert shape.weight_bytes(1) == 2 * matrices
    prompt = torch.zeros(2, 5, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(prompt, logits_to_keep=1)
    dense, _, head = base_kernels(shape, 1, Batch(tokens=10, sequences=2, attended=0, cached=0, distinct=0))
    ours = shape.layers * sum(kernel.flops for kernel in dense) + head.flops
    assert ours == counter.get_flop_counts()["Global"][torch.ops.aten.mm]


@pytest.mark.parametrize(
    ("name", "multiple", "ratio"),
    [("llama-3.1-70b", 2, 0.87), ("llama-3.1-70b", 4, 1.74), ("llama-3.1-8b", 2, 0.86), ("llama-3.1-8b", 4, 1.73)],
)
def test_parameter_ratios_are_the_papers(name: str, multiple: int, ratio: float) -> None:
    shape = SHAPES[name]
    found = bd_lora(multiple * 64, 8).parameters(shape) / replicated(64).parameters(shape)
    # The paper gives two digits; 1.725 is its 1.73.
    assert found == pytest.approx(ratio, abs=0.0051)


def test_s_lora_sends_what_the_paper_says() -> None:
    shape, tp, rank, tokens = SHAPES["llama-3.1-70b"], 8, 64, 32
    _, (qkv, o, *_) = lora_work(shape, s_lora(rank), tp, tokens, distinct=1)
    # Of float32, 4 bytes each.
    assert qkv.sent_bytes(tp) + o.sent_bytes(tp) == 4 * 5 * (tp - 1) * rank * tokens / tp


@pytest.mark.parametrize(
    ("make", "collectives"), [(bd_lora, 0), (replicated, 0), (csgmv, 2), (s_lora, 4)], ids=lambda x: str(x)
)
def test_collectives_that_lora_adds_to_a_layer(make: Callable[..., Serving], collectives: int) -> None:
    serving = bd_lora(64, 8) if make is bd_lora else make(64)
    kernels, added = lora_work(SHAPES["llama-3.1-8b"], serving, 8, tokens=1, distinct=1)
    assert len(kernels) == 8 and len(added) == collectives
    _, alone = lora_work(SHAPES["llama-3.1-8b"], serving, 1, tokens=1, distinct=1)
    assert alone == []


def test_kv_heads_are_copied_where_there_are_fewer_than_ranks() -> None:
    # Two KV heads on four ranks: a rank has one of them, half of k's rows, so two of four blocks meet it.
    (q, k, v), *_ = TINY.fused_layers(4)
    assert q.local_outputs == k.local_outputs == v.local_outputs == 2
    (shrink, *_), _ = lora_work(TINY, bd_lora(4, 4), 4, tokens=1, distinct=1)
    assert shrink.flops == 2 * (1 * 8 + 2 * (2 * 8))


def test_every_short_name_has_a_shape_by_name_and_by_repo() -> None:
    for name, repo in MODEL_NAMES.items():
        assert load_shape(name) is load_shape(repo)


def test_a_config_that_leaves_sizes_out(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    sizes = '"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 8'
    path.write_text(f'{{{sizes}, "vocab_size": 9, "num_key_value_heads": null, "num_experts": null, "heads": 5}}')
    assert load_shape(str(path)) == ModelShape(tmp_path.name, 64, 3, 4, 4, 16, 8, 9)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "expected the config of a dense decoder"),
        ('{"hidden_size": 64}', "num_hidden_layers: found"),
        (
            '{"hidden_size": 64, "num_hidden_layers": 0, "num_attention_heads": 4, "intermediate_size": 8, '
            '"vocab_size": 9}',
            "num_hidden_layers: found '0'",
        ),
        (
            '{"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 8, '
            '"vocab_size": 9, "num_local_experts": 8}',
            "num_local_experts: found '8', expected the config of a dense decoder",
        ),
    ],
    ids=["no-json", "missing-field", "no-layers", "experts"],
)
def test_configs_that_are_refused(tmp_path: Path, config: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(config)
    with pytest.raises(BDLoRAError, match=message):
        load_shape(str(path))
