"""The calibrated truncation: the optimum on activations where blocks are independent, never worse than without."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from bdlora_sglang.adapter import BlockSide
from bdlora_sglang.convert import Calibration, ConvertOptions, RankChoice, lora2bd
from bdlora_sglang.convert.blocks import Block, regroup
from bdlora_sglang.convert.truncate import truncate_blocks
from bdlora_sglang.errors import BDLoRAError
from tests.convert.oracle import deltas, dense_factors, snapshot

TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps. " * 60


def draw(
    inputs: int, outputs: int, rank: int, tokens: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """B, A, and inputs X (tokens, in) whose features correlate and differ much in size."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = randn(tokens, inputs) @ (randn(inputs, inputs) * torch.logspace(0, -2, inputs, dtype=torch.float64))
    return randn(outputs, rank), randn(rank, inputs), x


def dense(blocks: list[Block], side: BlockSide) -> torch.Tensor:
    return torch.cat([block.b @ block.a for block in blocks], dim=0 if side is BlockSide.B else 1)


shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(2, 7))


@settings(max_examples=30, deadline=None)
@given(shapes, st.sampled_from([2, 3]), st.integers(1, 3), st.sampled_from([3, 200]), st.integers(0, 2**16))
def test_column_parallel_equals_the_dense_weighted_svd(
    shape: tuple[int, int, int], nblocks: int, cut: int, tokens: int, seed: int
) -> None:
    """Also with fewer tokens than features, where the moments are singular."""
    b, a, x = draw(6 * shape[0], 6 * shape[1], shape[2], tokens, seed)
    z = x @ a.T
    blocks = regroup([Block(b, a)], BlockSide.B, nblocks)
    found, errors = truncate_blocks(blocks, BlockSide.B, cut, (z.T @ z / tokens)[None])
    error_sq = float((x @ (dense(found, BlockSide.B) - b @ a).T).square().sum()) / tokens
    best = sum(
        float(torch.linalg.svdvals(x @ a.T @ block.T)[cut:].square().sum()) / tokens for block in b.chunk(nblocks)
    )
    norm = float((x @ a.T @ b.T).square().sum()) / tokens
    assert error_sq == pytest.approx(best, rel=1e-6, abs=1e-13 * norm)
    assert errors.activation_error_sq == pytest.approx(best, rel=1e-6, abs=1e-13 * norm)
    plain, _ = truncate_blocks(blocks, BlockSide.B, cut)
    uncalibrated = float((x @ (dense(plain, BlockSide.B) - b @ a).T).square().sum()) / tokens
    assert errors.uncalibrated_activation_error_sq == pytest.approx(uncalibrated, rel=1e-6, abs=1e-13 * norm)
    assert errors.error_sq == pytest.approx(float((dense(found, BlockSide.B) - b @ a).square().sum()), rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(shapes, st.sampled_from([2, 3]), st.integers(1, 3), st.sampled_from([3, 200]), st.integers(0, 2**16))
def test_row_parallel_is_never_worse_than_each_block_on_its_own_nor_than_uncalibrated(
    shape: tuple[int, int, int], nblocks: int, cut: int, tokens: int, seed: int
) -> None:
    b, a, x = draw(6 * shape[0], 6 * shape[1], shape[2], tokens, seed)
    parts = list(zip(x.chunk(nblocks, dim=1), a.chunk(nblocks, dim=1), strict=True))
    z = torch.cat([x_k @ a_k.T for x_k, a_k in parts], dim=1)
    blocks = regroup([Block(b, a)], BlockSide.A, nblocks)

    def error_sq(found: list[Block]) -> float:
        return float((x @ (dense(found, BlockSide.A) - b @ a).T).square().sum()) / tokens

    found, errors = truncate_blocks(blocks, BlockSide.A, cut, z.T @ z / tokens)
    norm = float((x @ a.T @ b.T).square().sum()) / tokens
    assert errors.activation_error_sq == pytest.approx(error_sq(found), rel=1e-6, abs=1e-12 * norm)
    plain, _ = truncate_blocks(blocks, BlockSide.A, cut)
    own = []
    for x_k, a_k in parts:  # every block's own optimum, dense
        u = torch.linalg.svd(b @ a_k @ x_k.T, full_matrices=False).U[:, :cut]
        own.append(Block(u, u.T @ b @ a_k))
    slack = 1e-12 * norm
    assert error_sq(found) <= error_sq(plain) * (1 + 1e-9) + slack
    assert error_sq(found) <= error_sq(own) * (1 + 1e-9) + slack
    assert errors.uncalibrated_activation_error_sq == pytest.approx(error_sq(plain), rel=1e-6, abs=slack)
    assert errors.activation_norm_sq == pytest.approx(norm, rel=1e-9)
    assert errors.error_sq == pytest.approx(float((dense(found, BlockSide.A) - b @ a).square().sum()), rel=1e-6)


def test_row_parallel_blocks_make_good_for_each_other() -> None:
    """Where both blocks read the same inputs, one block's rank serves both: descent finds it, blocks alone do not."""
    b, a, x = draw(6, 8, 2, 100, 0)
    x = torch.cat([x[:, :3], x[:, :3]], dim=1)
    z = torch.cat([x_k @ a_k.T for x_k, a_k in zip(x.chunk(2, 1), a.chunk(2, 1), strict=True)], dim=1)
    found, errors = truncate_blocks(regroup([Block(b, a)], BlockSide.A, 2), BlockSide.A, 1, z.T @ z / 100)
    assert errors.activation_error_sq is not None and errors.uncalibrated_activation_error_sq is not None
    assert errors.activation_error_sq < 0.5 * errors.uncalibrated_activation_error_sq
    own = float((x @ (dense(found, BlockSide.A) - b @ a).T).square().sum()) / 100
    assert own == pytest.approx(errors.activation_error_sq)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def module_inputs(model: Path, names: Iterable[str], tokens: int) -> dict[str, torch.Tensor]:
    """By a forward pass of our own: what every module is given, (tokens, in)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(TEXT, add_special_tokens=False, return_tensors="pt")["input_ids"]
    base, inputs = AutoModelForCausalLM.from_pretrained(model), dict[str, torch.Tensor]()
    for name in names:
        base.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0][0].double()})
        )
    with torch.inference_mode():
        base(input_ids=ids[:, :tokens])
    return inputs


def activation_errors(inputs: dict[str, torch.Tensor], source: Path, other: Path) -> dict[str, float]:
    """Relative error of every module's delta on its inputs."""
    expected, found = deltas(source), deltas(other)
    return {
        name: float(torch.linalg.norm(x @ (found[name] - expected[name]).T) / torch.linalg.norm(x @ expected[name].T))
        for name, x in inputs.items()
    }


def test_end_to_end(model: Path, lora: Path, text: Path, tmp_path: Path) -> None:
    tokens = 200
    moments = tmp_path / "moments.safetensors"
    calibration = Calibration(str(text), str(model), str(moments), max_tokens=tokens, sequence_length=tokens)
    options = ConvertOptions(4, RankChoice(rank=8), calibration=calibration)
    report = lora2bd(lora, tmp_path / "bd", options)
    plain = lora2bd(lora, tmp_path / "plain", ConvertOptions(4, RankChoice(rank=8)))
    assert report.activation_error is not None and report.uncalibrated_activation_error is not None
    assert report.activation_error < 0.9 * report.uncalibrated_activation_error
    assert report.error > plain.error, "the price"
    inputs = module_inputs(model, deltas(lora), tokens)
    measured = activation_errors(inputs, lora, tmp_path / "bd")
    without = activation_errors(inputs, lora, tmp_path / "plain")
    for module in report.modules:
        assert module.activation_error == pytest.approx(measured[module.name], rel=1e-3)
        assert measured[module.name] <= without[module.name] * (1 + 1e-6)
    saved, q = load_file(moments), "model.layers.1.self_attn.q_proj"
    z = inputs[q] @ dense_factors(lora)[q][1].T
    assert torch.allclose(saved[q], z.T @ z / tokens, rtol=1e-4, atol=1e-6)
    # The saved moments do the same, and other ranks, without the model.
    reuse = Calibration(moments=str(moments))
    lora2bd(lora, tmp_path / "again", ConvertOptions(4, RankChoice(rank=8), calibration=reuse))
    weights = "adapter_model.safetensors"
    first, again = load_file(tmp_path / "bd" / weights), load_file(tmp_path / "again" / weights)
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    more = lora2bd(lora, tmp_path / "more", ConvertOptions(4, RankChoice(max_error=0.3), calibration=reuse))
    column = [module for module in more.modules if module.side is BlockSide.B]
    assert all(m.activation_error is not None and m.activation_error <= 0.3 for m in column)
    with pytest.raises(BDLoRAError, match=r"moments\.safetensors: moments of nblocks: found 4, expected 2"):
        lora2bd(lora, tmp_path / "x", ConvertOptions(2, RankChoice(rank=8), calibration=reuse))


def test_moments_of_another_adapter_are_refused(model: Path, lora: Path, text: Path, tmp_path: Path) -> None:
    from bdlora_perf.synthetic import make_adapter

    moments = tmp_path / "moments"
    calibration = Calibration(str(text), str(model), str(moments), max_tokens=64)
    lora2bd(lora, tmp_path / "bd", ConvertOptions(4, RankChoice(rank=8), calibration=calibration))
    before = snapshot(tmp_path)
    other = make_adapter(tmp_path.parent / "other", model, rank=8, seed=5)
    reuse = ConvertOptions(4, RankChoice(rank=8), calibration=Calibration(moments=str(moments)))
    with pytest.raises(BDLoRAError, match="moments of source"):
        lora2bd(other, tmp_path / "x", reuse)
    moments.write_bytes(b"no")
    with pytest.raises(BDLoRAError, match="a file that --moments saved"):
        lora2bd(lora, tmp_path / "x", reuse)
    assert snapshot(tmp_path).keys() == before.keys()


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (Calibration(text="missing.txt", model="m"), "--calibrate: found no file missing.txt"),
        (Calibration(text="t"), "--calibrate and --model: found one of them"),
        (Calibration(), "found neither --calibrate nor --moments"),
        (Calibration(moments="missing"), "missing: moments: found no such file"),
        (Calibration("t", "m", "nowhere/moments"), "--moments: found no folder nowhere"),
        (Calibration("t", "m", max_tokens=0), "calibration: found 0 tokens"),
    ],
    ids=["no-text", "no-model", "nothing", "no-moments", "no-folder", "no-tokens"],
)
def test_refusals(calibration: Calibration, message: str, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(BDLoRAError, match=message):
        lora2bd(lora, tmp_path / "x", ConvertOptions(4, RankChoice(rank=8), calibration=calibration))
    assert not list(tmp_path.iterdir())
