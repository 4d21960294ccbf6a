"""SGLang's own parallel layers, wrapped, for every rank: shards as the layers have them, KV heads replicated included.

More head counts and TP degrees than engines can be started for (`test_tp_degrees`), so the layers are built without.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bdlora_kernels import EagerFactors, HostBlock, PackedFactors, SlotSize, group_tokens
from bdlora_sglang.adapter import Adapter
from tests.serving.zoo import Zoo

TOKENS = 5
NAMES = ("q_proj", "k_proj", "v_proj")


@pytest.fixture
def as_rank(zoo: Zoo) -> Iterator[Any]:
    """Makes this process a rank of a TP group without communication, in SGLang's runtime context."""
    from sglang.srt.runtime_context import SpawnRanks, get_parallel, publish
    from sglang.srt.server_args import ServerArgs

    from bdlora_sglang.serving.engine import platform_defaults

    def become(rank: int, tp: int) -> None:
        arguments = {**platform_defaults(tp, 1), "model_path": str(zoo.model("llama")), "tp_size": tp}
        server_args = ServerArgs(**arguments)
        server_args.resolve_once()
        get_parallel().clear_stamp()
        publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=rank, dp_rank=None, gpu_id=0))

    yield become
    get_parallel().clear_stamp()


def dense_delta(adapter: Adapter, tensors: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """The whole module's delta in float64, from PEFT's stored tensors by the definition of block_diag."""
    module = adapter.modules[name]
    a, b = tensors[module.tensor_a].double(), tensors[module.tensor_b].double()
    if a.shape[1] != module.in_features:
        a = torch.block_diag(*a.chunk(module.nblocks))
    if b.shape[1] != module.rank:
        b = torch.block_diag(*b.chunk(module.nblocks))
    return module.scaling * (x.double() @ a.T @ b.T)


def _qkv_cases() -> list[tuple[int, int, int | None]]:
    """KV heads x TP degree x blocks, where SGLang can shard the heads and PEFT can divide them into blocks."""
    return [
        (kv_heads, tp, nblocks)
        for kv_heads, tp, nblocks in itertools.product([2, 3, 12], [2, 4, 6], [None, 2, 4, 8])
        if (tp % kv_heads == 0 or kv_heads % tp == 0) and (nblocks is None or (kv_heads * 8) % nblocks == 0)
    ]


@pytest.mark.parametrize(("kv_heads", "tp", "nblocks"), _qkv_cases())
def test_qkv_with_replicated_kv_heads(zoo: Zoo, as_rank: Any, kv_heads: int, tp: int, nblocks: int | None) -> None:
    from sglang.srt.layers.linear import QKVParallelLinear

    model = zoo.model("llama", num_key_value_heads=kv_heads)
    path = zoo.adapter(model, f"qkv-{nblocks}", rank=8, nblocks=nblocks, target_modules=NAMES, seed=21)
    adapter, tensors = Adapter.open(path), load_file(path / "adapter_model.safetensors")
    base = load_file(next(Path(model).glob("*.safetensors")))
    x = torch.randn(TOKENS, 96, generator=torch.Generator().manual_seed(0))
    expected = {}
    for name in NAMES:
        full = f"model.layers.0.self_attn.{name}"
        expected[name] = x.double() @ base[f"{full}.weight"].double().T + dense_delta(adapter, tensors, full, x)

    for rank in range(tp):
        as_rank(rank, tp)
        layer = QKVParallelLinear(96, 8, 24, kv_heads, bias=False, params_dtype=torch.float32, parallel_group="tp")
        for shard, name in zip("qkv", NAMES, strict=True):
            layer.weight_loader(layer.weight, base[f"model.layers.0.self_attn.{name}.weight"], shard)
        output = _forward(adapter, "qkv_proj", layer, x)
        heads = {"q_proj": (rank * 24 // tp, 24 // tp), "k_proj": _kv_heads(rank, tp, kv_heads)}
        heads["v_proj"] = heads["k_proj"]
        rows = [expected[name][:, first * 8 : (first + count) * 8] for name, (first, count) in heads.items()]
        torch.testing.assert_close(output.double(), torch.cat(rows, dim=1), atol=1e-4, rtol=1e-5)


def _kv_heads(rank: int, tp: int, kv_heads: int) -> tuple[int, int]:
    """First KV head and their number on a rank: ``tp / kv_heads`` neighbours share one when there are few."""
    return (rank * kv_heads // tp, 1) if tp > kv_heads else (rank * (kv_heads // tp), kv_heads // tp)


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("nblocks", [None, 1, 2, 3, 4, 8])
def test_row_parallel_partial_sums(zoo: Zoo, as_rank: Any, tp: int, nblocks: int | None) -> None:
    """The ranks' partial outputs, added up as the layer's own all-reduce does, are the whole."""
    from sglang.srt.layers.linear import RowParallelLinear

    model = zoo.model("llama")
    path = zoo.adapter(model, f"down-{nblocks}", rank=24, nblocks=nblocks, target_modules=["down_proj"], seed=22)
    adapter, tensors = Adapter.open(path), load_file(path / "adapter_model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    weight = load_file(next(Path(model).glob("*.safetensors")))[f"{name}.weight"]
    x = torch.randn(TOKENS, 384, generator=torch.Generator().manual_seed(1))
    total = torch.zeros(TOKENS, 96, dtype=torch.float64)
    for rank in range(tp):
        as_rank(rank, tp)
        layer = RowParallelLinear(
            384, 96, bias=False, params_dtype=torch.float32, reduce_results=False, parallel_group="tp"
        )
        layer.weight_loader(layer.weight, weight)
        part = 384 // tp
        total += _forward(adapter, "down_proj", layer, x[:, rank * part : (rank + 1) * part]).double()
    expected = x.double() @ weight.double().T + dense_delta(adapter, tensors, name, x)
    torch.testing.assert_close(total, expected, atol=1e-4, rtol=1e-5)


def assert_fits(slot: SlotSize, factors: EagerFactors) -> None:
    """A slot for adapters of this rank takes what the rank holds of one."""
    needed = SlotSize.of(PackedFactors(factors.a_SE[0], factors.b_SE[0], factors.slices[0]))
    assert slot.fits(needed), (slot, needed)


def _forward(adapter: Adapter, kind: str, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The wrapped layer's output on this rank, all tokens with the adapter, through pool layout, backend and kernel."""
    from bdlora_sglang.serving.backend import BatchInfo, BDLoRABackend
    from bdlora_sglang.serving.communication_free import CommunicationFree
    from bdlora_sglang.serving.head_rows import HeadRows
    from bdlora_sglang.serving.kernels import TorchKernels
    from bdlora_sglang.serving.layers import wrap_layer

    backend = BDLoRABackend(2, torch.device("cpu"))
    kernels = TorchKernels(torch.device("cpu"))
    backend.use(CommunicationFree(), kernels)
    factors = _local_factors(adapter, kind, layer, CommunicationFree())
    wrapped = wrap_layer(kind, layer, backend)
    wrapped.set_lora_info(factors)
    backend.batch_info = BatchInfo(True, kernels.segments([0], [len(x)], graph=None), HeadRows((0,), None))
    return wrapped(x)[0]


def _local_factors(adapter: Adapter, kind: str, layer: torch.nn.Module, sharding: Any) -> EagerFactors:
    """The factors of the first layer that this rank holds, in slot 0 of a pool."""
    from bdlora_sglang.serving.local_adapter import plan_adapter, read_adapter
    from bdlora_sglang.serving.served_modules import served_modules

    parent = "self_attn" if kind == "qkv_proj" else "mlp"
    tree = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": torch.nn.ModuleList([])})})
    tree["model"]["layers"].append(torch.nn.ModuleDict({parent: torch.nn.ModuleDict({kind: layer})}))
    served = served_modules(tree, object())
    # The adapter covers all layers of its model; here is the first.
    first = {name: module for name, module in adapter.modules.items() if ".layers.0." in name}
    own = Adapter(adapter.config, first, adapter.checkpoint)
    plan = plan_adapter("test", own, served, sharding, torch.float32)
    local = read_adapter(plan, own, lambda elements: HostBlock.allocate(elements, 0, torch.float32, pin_memory=False))
    (packed,) = local.packed.layers.values()
    factors = EagerFactors.allocate(1, packed.a_E.numel(), packed.b_E.numel(), torch.float32, torch.device("cpu"))
    factors.write(0, packed)
    return factors


@pytest.mark.parametrize("lora_rank", [3, 8])
@pytest.mark.parametrize(("kv_heads", "tp"), [(2, 4), (3, 6), (12, 4)])
@pytest.mark.parametrize("blocks", ["plain", "2"])
def test_fully_sharded_qkv(zoo: Zoo, as_rank: Any, kv_heads: int, tp: int, blocks: str, lora_rank: int) -> None:
    """Shrink on every rank, the outputs side by side as an all-gather leaves them, expand on every rank.

    Rank 3 leaves ranks without any row of A, and TP does not divide it.
    """
    from sglang.srt.layers.linear import QKVParallelLinear

    from bdlora_kernels.eager import expand, shrink
    from bdlora_sglang.serving.fully_sharded import FullySharded

    nblocks = None if blocks == "plain" else int(blocks)
    if nblocks and (lora_rank % nblocks or (kv_heads * 8) % nblocks):
        pytest.skip("PEFT has no such adapter")
    model = zoo.model("llama", num_key_value_heads=kv_heads)
    path = zoo.adapter(
        model, f"qkv-{blocks}-{lora_rank}", rank=lora_rank, nblocks=nblocks, target_modules=NAMES, seed=23
    )
    adapter, tensors = Adapter.open(path), load_file(path / "adapter_model.safetensors")
    x = torch.randn(TOKENS, 96, generator=torch.Generator().manual_seed(2))
    segments = group_tokens([0, -1], [TOKENS - 1, 1], torch.device("cpu"))
    factors = []
    for rank in range(tp):
        as_rank(rank, tp)
        layer = QKVParallelLinear(96, 8, 24, kv_heads, bias=False, params_dtype=torch.float32, parallel_group="tp")
        factors.append(_local_factors(adapter, "qkv_proj", layer, FullySharded()))
        assert_fits(FullySharded().slot_size("", layer, lora_rank), factors[-1])
    gathered = torch.stack([shrink(x, own, segments) for own in factors])
    for rank, own in enumerate(factors):
        heads = [(rank * 24 // tp, 24 // tp), _kv_heads(rank, tp, kv_heads), _kv_heads(rank, tp, kv_heads)]
        output = torch.zeros(TOKENS, 8 * sum(count for _, count in heads))
        expand(output, gathered, own, segments)
        rows = [
            dense_delta(adapter, tensors, f"model.layers.0.self_attn.{name}", x)[:, first * 8 : (first + count) * 8]
            for name, (first, count) in zip(NAMES, heads, strict=True)
        ]
        expected = torch.cat(rows, dim=1)
        expected[-1] = 0  # the base model's token
        torch.testing.assert_close(output.double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("tp", [1, 2, 3, 8])
@pytest.mark.parametrize("nblocks", [None, 2, 3, 8])
def test_fully_sharded_row_parallel(zoo: Zoo, as_rank: Any, tp: int, nblocks: int | None) -> None:
    """Shrink outputs added up as an all-reduce does; each rank adds to its own part of the output."""
    from sglang.srt.layers.linear import RowParallelLinear

    from bdlora_kernels.eager import expand, shrink
    from bdlora_sglang.serving.fully_sharded import FullySharded

    model = zoo.model("llama")
    path = zoo.adapter(model, f"down-{nblocks}", rank=24, nblocks=nblocks, target_modules=["down_proj"], seed=22)
    adapter, tensors = Adapter.open(path), load_file(path / "adapter_model.safetensors")
    x = torch.randn(TOKENS, 384, generator=torch.Generator().manual_seed(1))
    segments = group_tokens([0], [TOKENS], torch.device("cpu"))
    factors, sizes, shrunk, part = [], [], torch.zeros(TOKENS, 24), 384 // tp
    for rank in range(tp):
        as_rank(rank, tp)
        layer = RowParallelLinear(
            384, 96, bias=False, params_dtype=torch.float32, reduce_results=False, parallel_group="tp"
        )
        factors.append(_local_factors(adapter, "down_proj", layer, FullySharded()))
        assert_fits(FullySharded().slot_size("", layer, 24), factors[-1])
        shape = FullySharded().shape("", layer)
        assert shape.inputs == part
        sizes.append(shape.outputs)
        shrunk += shrink(x[:, rank * part : (rank + 1) * part], factors[-1], segments)
    total = torch.zeros(TOKENS, 96)
    for own, output in zip(factors, total.split(sizes, dim=1), strict=True):
        expand(output, shrunk[None], own, segments)
    expected = dense_delta(adapter, tensors, "model.layers.0.mlp.down_proj", x)
    torch.testing.assert_close(total.double(), expected, atol=1e-4, rtol=1e-5)
