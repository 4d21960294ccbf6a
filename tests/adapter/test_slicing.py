"""Each rank's slices against PEFT: the part of PEFT's delta that reads the rank's inputs and writes its outputs."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import BdLoraConfig, LoraConfig, get_peft_model
from torch import nn

from bdlora_sglang.adapter import Adapter, BlockSide, LoRAModule, ModuleShard, read_slice, slice_module
from bdlora_sglang.adapter.shard import column_shard, row_shard

# float64 all the way, so that only the order of the sums differs.
TOLERANCE = 1e-12

Forward = Callable[[torch.Tensor], torch.Tensor]


class Net(nn.Module):
    """One module of each side, by the names that PEFT's patterns match."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(in_features, out_features, bias=True)
        self.o_proj = nn.Linear(in_features, out_features, bias=False)


def peft_adapter(
    folder: Path, in_features: int, out_features: int, config: LoraConfig
) -> tuple[Adapter, dict[str, Forward]]:
    """An adapter that PEFT wrote, as we read it, and PEFT's own delta of each module (``forward - base``)."""
    torch.manual_seed(0)
    net = Net(in_features, out_features).double()
    model = get_peft_model(net, config).double()
    for name, weight in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight)
    model.save_pretrained(str(folder))

    def delta(layer: Any) -> Forward:
        return lambda x: (layer(x) - layer.base_layer(x)).detach()

    layers = {name: layer for name, layer in net.named_children() if hasattr(layer, "base_layer")}  # replaced in place
    return Adapter.open(folder), {name: delta(layer) for name, layer in layers.items()}


def rank_delta(adapter: Adapter, module: LoRAModule, shard: ModuleShard, x: torch.Tensor, width: int) -> torch.Tensor:
    """What the rank's slices add, by the definition of a slice; ``x`` is the rank's own input."""
    y = torch.zeros(len(x), width, dtype=torch.float64)
    for part in slice_module(module, shard):
        factors = read_slice(adapter, part, torch.float64)
        assert factors.a.shape == (part.rank, part.input_size) and factors.b.shape == (part.output_size, part.rank)
        assert factors.a.is_contiguous() and factors.b.is_contiguous()
        window = x[:, factors.input_start : factors.input_start + part.input_size]
        y[:, factors.output_start : factors.output_start + part.output_size] += (
            factors.scaling * window @ factors.a.T @ factors.b.T
        )
    return y


def assert_rank_is_peft(adapter: Adapter, module: LoRAModule, shard: ModuleShard, forward: Forward) -> None:
    """The rank's delta equals PEFT's for an input that is zero outside ``shard.inputs``, within ``shard.outputs``.

    The rank's own input and output are wider than the shard, and what lies around it must neither be read nor written.
    """
    x = torch.randn(5, module.in_features, dtype=torch.float64)
    masked = torch.zeros_like(x)
    masked[:, shard.inputs.start : shard.inputs.stop] = x[:, shard.inputs.start : shard.inputs.stop]
    expected = forward(masked)[:, shard.outputs.start : shard.outputs.stop]

    local = torch.full((5, shard.input_offset + len(shard.inputs) + 3), float("nan"), dtype=torch.float64)
    local[:, shard.input_offset : shard.input_offset + len(shard.inputs)] = masked[
        :, shard.inputs.start : shard.inputs.stop
    ]
    got = rank_delta(adapter, module, shard, local, shard.output_offset + len(shard.outputs) + 3)

    inside = slice(shard.output_offset, shard.output_offset + len(shard.outputs))
    torch.testing.assert_close(got[:, inside], expected, rtol=TOLERANCE, atol=TOLERANCE)
    outside = torch.ones(got.shape[1], dtype=torch.bool)
    outside[inside] = False
    assert not got[:, outside].any(), "padding was written"


def lora_config(nblocks: int | None, rank: int = 24, **fields: Any) -> LoraConfig:
    bdlora = BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=nblocks or 1)
    return LoraConfig(
        r=rank, lora_alpha=10, target_modules=["q_proj", "o_proj"], use_bdlora=bdlora if nblocks else None, **fields
    )


SIDES = {"q_proj": BlockSide.B, "o_proj": BlockSide.A}

PATTERNS: dict[str, dict[str, Any]] = {
    "one-rank": {},
    "rank-pattern": {"rank_pattern": {"o_proj": 48, "q_proj": 72}, "alpha_pattern": {"q_proj": 7}},
    "rslora": {"use_rslora": True, "rank_pattern": {"^q_proj": 48}},
}


@pytest.mark.parametrize("fields", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("nblocks", [None, 1, 2, 3, 4, 8], ids=lambda n: "plain" if n is None else f"{n}-blocks")
def test_ranks_together_are_peft(nblocks: int | None, fields: dict[str, Any], tmp_path: Path) -> None:
    adapter, forwards = peft_adapter(tmp_path, 96, 48, lora_config(nblocks, **fields))
    for tp_size in (1, 2, 3, 4, 5, 8):
        for name, cut in (("q_proj", column_shard), ("o_proj", row_shard)):
            module, forward = adapter.modules[name], forwards[name]
            assert module.side is (BlockSide.NONE if nblocks is None else SIDES[name])
            x = torch.randn(4, module.in_features, dtype=torch.float64)
            total = torch.zeros(4, module.out_features, dtype=torch.float64)
            for tp_rank in range(tp_size):
                shard = cut(module, tp_size, tp_rank)
                assert_rank_is_peft(adapter, module, shard, forward)
                local = x[:, shard.inputs.start : shard.inputs.stop]
                total[:, shard.outputs.start : shard.outputs.stop] += rank_delta(
                    adapter, module, shard, local, len(shard.outputs)
                )
            torch.testing.assert_close(total, forward(x), rtol=TOLERANCE, atol=TOLERANCE, msg=f"{name}, TP {tp_size}")


@pytest.mark.parametrize("nblocks", [1, 2, 3, 4, 8], ids=lambda n: f"{n}-blocks")
@pytest.mark.parametrize("tp_size", [2, 3, 4, 8], ids=lambda n: f"tp{n}")
def test_replicated_kv_heads(nblocks: int, tp_size: int, tmp_path: Path) -> None:
    """Two KV heads of 24 features: ranks ``i`` and ``i + 1`` may own one whole head, which meets several blocks."""
    adapter, forwards = peft_adapter(tmp_path, 96, 48, lora_config(nblocks))
    for tp_rank in range(tp_size):
        head = tp_rank * 2 // tp_size
        shard = ModuleShard(range(96), range(head * 24, (head + 1) * 24), output_offset=11)
        assert_rank_is_peft(adapter, adapter.modules["q_proj"], shard, forwards["q_proj"])


@pytest.mark.parametrize("nblocks", [None, 1, 2, 3, 4, 8], ids=lambda n: "plain" if n is None else f"{n}-blocks")
def test_any_window_of_a_padded_layer(nblocks: int | None, tmp_path: Path) -> None:
    """Windows that nothing aligns, empty ones included, at any place of a wider layer."""
    adapter, forwards = peft_adapter(tmp_path, 48, 72, lora_config(nblocks))
    random_windows = random.Random(0)

    def window(size: int) -> range:
        start = random_windows.randint(0, size)
        return range(start, random_windows.randint(start, size))

    for _ in range(40):
        for name, module in adapter.modules.items():
            offsets = random_windows.randrange(9), random_windows.randrange(9)
            shard = ModuleShard(window(module.in_features), window(module.out_features), *offsets)
            assert_rank_is_peft(adapter, module, shard, forwards[name])


@pytest.mark.parametrize(
    ("nblocks", "tp_size", "local_ranks"),
    [
        pytest.param(None, 4, [24] * 4, id="plain"),
        pytest.param(4, 4, [6] * 4, id="a-block-a-rank"),
        pytest.param(8, 4, [6] * 4, id="two-blocks-a-rank"),
        pytest.param(2, 4, [12] * 4, id="a-block-over-two-ranks"),
        pytest.param(3, 4, [8, 16, 16, 8], id="uneven"),
        pytest.param(4, 3, [12, 12, 12], id="uneven-more-blocks"),
    ],
)
def test_local_rank_is_own_rank_of_the_blocks_met(
    nblocks: int | None, tp_size: int, local_ranks: list[int], tmp_path: Path
) -> None:
    adapter, _ = peft_adapter(tmp_path, 96, 48, lora_config(nblocks))
    for name, cut in (("q_proj", column_shard), ("o_proj", row_shard)):
        module = adapter.modules[name]
        slices = [slice_module(module, cut(module, tp_size, rank)) for rank in range(tp_size)]
        assert [sum(part.rank for part in parts) for parts in slices] == local_ranks


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_n_blocks_on_n_ranks_read_one_nth_each(n: int, tmp_path: Path) -> None:
    peft_adapter(tmp_path, 96, 48, lora_config(n))
    whole = sum(weight.numel() * 8 for weight in _stored_weights(tmp_path))
    for tp_rank in range(n):
        adapter, factor_bytes = Adapter.open(tmp_path), 0
        for name, cut in (("q_proj", column_shard), ("o_proj", row_shard)):
            module = adapter.modules[name]
            for part in slice_module(module, cut(module, n, tp_rank)):
                factors = read_slice(adapter, part, torch.float64)
                factor_bytes += sum(factor.untyped_storage().nbytes() for factor in (factors.a, factors.b))
        assert adapter.checkpoint.bytes_read == factor_bytes == whole // n


def test_plain_adapter_reads_its_shared_factor_whole_and_splits_the_other(tmp_path: Path) -> None:
    peft_adapter(tmp_path, 96, 48, lora_config(None))
    adapter = Adapter.open(tmp_path)
    for part in slice_module(adapter.modules["q_proj"], column_shard(adapter.modules["q_proj"], 4, 1)):
        read_slice(adapter, part, torch.float32)
    assert adapter.checkpoint.bytes_read == 8 * (24 * 96 + 48 * 24 // 4)


def test_no_memory_is_shared_with_the_file_or_the_given_tensors(tmp_path: Path) -> None:
    peft_adapter(tmp_path, 96, 48, lora_config(4))
    on_disk = Adapter.open(tmp_path)
    checkpoint = on_disk.checkpoint
    tensors = {name: torch.ones(checkpoint.shape(name), dtype=torch.float64) for name in checkpoint.names()}
    in_memory = Adapter.from_tensors(tensors, on_disk.config.raw, "from-tensors")
    for adapter in (on_disk, in_memory):
        module = adapter.modules["q_proj"]
        for part in slice_module(module, column_shard(module, 2, 0)):
            factors = read_slice(adapter, part, torch.float64)
            factors.a.zero_()
            factors.b.zero_()
            again = read_slice(adapter, part, torch.float64)
            assert again.a.any() and again.b.any()


def _stored_weights(folder: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return list(load_file(folder / "adapter_model.safetensors").values())
