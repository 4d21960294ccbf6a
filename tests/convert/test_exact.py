"""What must be exact is: lossless conversion, going back, other block counts; in every type and with every scaling."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bdlora_sglang.adapter import Adapter, read_slice, slice_module
from bdlora_sglang.adapter.shard import column_shard, row_shard
from bdlora_sglang.convert import ConvertOptions, RankChoice, bd2lora, lora2bd, reblock
from tests.convert.oracle import (
    CONFIG,
    WEIGHTS,
    O,
    Q,
    deltas,
    read_config,
    relative_errors,
    save_lora,
    scaling,
    snapshot,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = {Q: (24, 48), O: (48, 24)}


def assert_same_deltas(a: Path, b: Path) -> None:
    """To the last bit, with integer factors: then the order of the sums does not matter."""
    expected, found = deltas(a), deltas(b)
    assert expected.keys() == found.keys()
    for module, delta in expected.items():
        assert torch.equal(found[module], delta), module


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nblocks", [2, 3, 8])
def test_lossless_has_the_same_deltas_and_goes_back_to_the_same_bytes(
    nblocks: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = save_lora(tmp_path / "lora", SHAPES, rank=5, dtype=dtype, integers=True)
    report = lora2bd(source, tmp_path / "bd", ConvertOptions(nblocks), lossless=True)
    assert report.error == 0
    assert [(module.source_rank, module.rank) for module in report.modules] == [(5, 5 * nblocks)] * 2
    assert_same_deltas(source, tmp_path / "bd")
    bd2lora(tmp_path / "bd", tmp_path / "back")
    before, after = load_file(source / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype is dtype
        assert torch.equal(after[name], tensor), name


def test_lossless_layout_is_pefts(tmp_path: Path) -> None:
    source = save_lora(tmp_path / "lora", SHAPES, rank=4)
    lora2bd(source, tmp_path / "bd", ConvertOptions(3), lossless=True)
    lora, bd = load_file(source / WEIGHTS), load_file(tmp_path / "bd" / WEIGHTS)
    prefix = "base_model.model."
    assert torch.equal(bd[f"{prefix}{Q}.lora_A.weight"], lora[f"{prefix}{Q}.lora_A.weight"].repeat(3, 1))
    assert torch.equal(bd[f"{prefix}{Q}.lora_B.weight"], lora[f"{prefix}{Q}.lora_B.weight"])
    columns = lora[f"{prefix}{O}.lora_A.weight"].chunk(3, dim=1)
    assert torch.equal(bd[f"{prefix}{O}.lora_A.weight"], torch.cat(columns))
    assert torch.equal(bd[f"{prefix}{O}.lora_B.weight"], lora[f"{prefix}{O}.lora_B.weight"].repeat(1, 3))


@settings(max_examples=25, deadline=None)
@given(
    nblocks=st.sampled_from([1, 2, 3, 4, 6, 12]),
    new=st.sampled_from([1, 2, 3, 4, 6, 12]),
    block_rank=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
    use_rslora=st.booleans(),
)
def test_reblock_there_and_back(
    nblocks: int, new: int, block_rank: int, dtype: torch.dtype, seed: int, use_rslora: bool
) -> None:
    with TemporaryDirectory() as folder:
        source = save_bd(Path(folder) / "bd", nblocks, block_rank, dtype, seed, use_rslora)
        there, back = Path(folder) / "there", Path(folder) / "back"
        reblock(source, there, ConvertOptions(new))
        assert_same_scaled(source, there)
        report = reblock(there, back, ConvertOptions(nblocks))
        assert_same_scaled(source, back)
        # No rank is left over from the way: padding and repetition go again.
        assert all(module.rank <= nblocks * block_rank for module in report.modules)


def save_bd(folder: Path, nblocks: int, block_rank: int, dtype: torch.dtype, seed: int, use_rslora: bool) -> Path:
    """A random BD-LoRA adapter with integer factors, or a plain one for one block."""
    rank = nblocks * block_rank
    bd = {"nblocks": nblocks, "target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"]}
    save_lora(folder, SHAPES, rank, use_rslora=use_rslora, use_bdlora=bd if nblocks > 1 else None)
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        f"{Q}.lora_A": (rank, 24), f"{Q}.lora_B": (48, block_rank),
        f"{O}.lora_A": (rank, 48 // nblocks), f"{O}.lora_B": (24, rank),
    }  # fmt: skip
    tensors = {
        f"base_model.model.{name}.weight": torch.randint(1, 5, shape, generator=generator).to(dtype)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / WEIGHTS)
    return folder


def assert_same_scaled(a: Path, b: Path) -> None:
    """The product of the factors to the last bit, PEFT's scaling to one unit of float64's last place."""
    for module in (Q, O):
        before, after = scaling(read_config(a), module), scaling(read_config(b), module)
        assert after == pytest.approx(before, rel=2.3e-16, abs=0)
    expected, found = deltas(a), deltas(b)
    for module, delta in expected.items():
        assert torch.allclose(found[module], delta, rtol=1e-15, atol=0), module


def test_merging_blocks_keeps_the_rank_and_stores_the_zeros(tmp_path: Path) -> None:
    source = save_bd(tmp_path / "bd", 4, 3, torch.float32, 0, False)
    report = reblock(source, tmp_path / "two", ConvertOptions(2))
    assert [module.rank for module in report.modules] == [12, 12]
    report = bd2lora(source, tmp_path / "lora")
    assert [module.rank for module in report.modules] == [12, 12]
    assert read_config(tmp_path / "lora")["use_bdlora"] is None


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scaling_by_patterns_and_rslora(use_rslora: bool, tmp_path: Path) -> None:
    patterns: dict[str, Any] = {"rank_pattern": {Q: 3}, "alpha_pattern": {O: 0.3}}
    source = save_lora(tmp_path / "lora", SHAPES, rank=6, lora_alpha=7, use_rslora=use_rslora, **patterns)
    for nblocks in (2, 3, 6):
        bd = tmp_path / f"bd-{nblocks}"
        lora2bd(source, bd, ConvertOptions(nblocks), lossless=True)
        for module in SHAPES:
            before, after = (scaling(read_config(folder), module) for folder in (source, bd))
            if use_rslora:  # a float64 alpha whose quotient by sqrt(rank) is exact need not exist
                assert after == pytest.approx(before, rel=2.3e-16, abs=0)
                assert torch.tensor(after).float() == torch.tensor(before).float()
            else:
                assert after == before


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 8])
def test_what_ranks_serve_adds_up(tp_size: int, tmp_path: Path) -> None:
    """By the slices that the server reads: every rank's part of the delta, put together, is the source's."""
    source = save_lora(tmp_path / "lora", SHAPES, integers=True)
    lora2bd(source, tmp_path / "bd", ConvertOptions(4), lossless=True)
    adapter, expected = Adapter.open(tmp_path / "bd"), deltas(source)
    for name, module in adapter.modules.items():
        delta = torch.zeros(module.out_features, module.in_features, dtype=torch.float64)
        for rank in range(tp_size):
            shard = (column_shard if name == Q else row_shard)(module, tp_size, rank)
            parts = slice_module(module, shard)
            if tp_size == 4:
                assert [part.rank for part in parts] == [4], "one block of the source's rank on each GPU"
            for part in parts:
                factors = read_slice(adapter, part, torch.float64)
                row, column = shard.outputs.start + part.output_start, shard.inputs.start + part.input_start
                window = delta[row : row + part.output_size, column : column + part.input_size]
                window += part.scaling * factors.b @ factors.a
        assert torch.equal(delta, expected[name])


def test_one_rounding_to_bfloat16(tmp_path: Path) -> None:
    source = save_lora(tmp_path / "lora", SHAPES)
    report = lora2bd(source, tmp_path / "bd", ConvertOptions(2, dtype="bfloat16"), lossless=True)
    lora, bd = load_file(source / WEIGHTS), load_file(tmp_path / "bd" / WEIGHTS)
    name = f"base_model.model.{Q}.lora_B.weight"
    assert torch.equal(bd[name], lora[name].bfloat16())
    errors = relative_errors(source, tmp_path / "bd")
    assert {module.name: module.error for module in report.modules} == pytest.approx(errors, rel=1e-6)
    assert 0 < report.error < 2**-8


def test_types_that_differ_are_widened_exactly(tmp_path: Path) -> None:
    source = save_lora(tmp_path / "lora", SHAPES, integers=True)
    tensors = load_file(source / WEIGHTS)
    tensors = {name: t.bfloat16() if "lora_A" in name else t.half() for name, t in tensors.items()}
    save_file(tensors, source / WEIGHTS)
    lora2bd(source, tmp_path / "bd", ConvertOptions(2), lossless=True)
    assert {t.dtype for t in load_file(tmp_path / "bd" / WEIGHTS).values()} == {torch.float32}
    assert_same_deltas(source, tmp_path / "bd")


def test_an_untrained_adapter_keeps_its_rank(tmp_path: Path) -> None:
    source = save_lora(tmp_path / "lora", SHAPES)
    tensors = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in load_file(source / WEIGHTS).items()}
    save_file(tensors, source / WEIGHTS)
    report = lora2bd(source, tmp_path / "bd", ConvertOptions(2), lossless=True)
    assert [module.rank for module in report.modules] == [8, 8]
    assert lora2bd(source, tmp_path / "cut", ConvertOptions(2, RankChoice(rank=2))).error == 0


@pytest.mark.parametrize("threads", [1, 3])
def test_same_input_same_bytes(threads: int, tmp_path: Path) -> None:
    source = save_lora(
        tmp_path / "lora", {f"model.layers.{i}.{m}": (32, 32) for i in range(5) for m in ("q_proj", "o_proj")}
    )
    for name, choice in (("a", RankChoice(max_error=0.4)), ("b", RankChoice(rank=4))):
        lora2bd(source, tmp_path / name, ConvertOptions(2, choice))
        lora2bd(source, tmp_path / f"{name}2", ConvertOptions(2, choice, threads=threads))
        assert snapshot(tmp_path / name) == snapshot(tmp_path / f"{name}2")


def test_other_fields_and_files_are_kept(tmp_path: Path) -> None:
    source = save_lora(
        tmp_path / "lora", SHAPES, lora_dropout=0.1, base_model_name_or_path="b", revision="r", novel=[1]
    )
    (source / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    (source / "tokenizer.json").write_text("{}")
    (source / "chat").mkdir()
    (source / "chat" / "template.jinja").write_text("x")
    lora2bd(source, tmp_path / "bd", ConvertOptions(2), lossless=True)
    before, after = read_config(source), read_config(tmp_path / "bd")
    changed = {key for key in after if after[key] != before.get(key)}
    assert changed == {"r", "lora_alpha", "use_bdlora", "rank_pattern", "alpha_pattern"}
    assert {*after} == {*before, *changed}
    assert (tmp_path / "bd" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "bd" / "chat" / "template.jinja").read_text() == "x"
    card = (tmp_path / "bd" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\nMine.\n\n## BD-LoRA conversion\n")
    assert "nblocks=2" in card
    assert {path.name for path in (tmp_path / "bd").iterdir()} == {
        CONFIG,
        WEIGHTS,
        "README.md",
        "tokenizer.json",
        "chat",
    }
