"""The truncation is the optimum: as good as a dense SVD of every block (Eckart-Young), and rank goes where it helps."""

import itertools
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdlora_sglang.convert import ConvertOptions, RankChoice, lora2bd, reblock
from bdlora_sglang.convert.allocation import ModuleCost, greedy, spent, tail_energies
from tests.convert.oracle import O, Q, deltas, dense_factors, relative_errors, save_lora

PAPER = {  # (in, out) of one layer, and the published ratios for twice and four times the rank at 8 blocks
    "Llama-3.1-8B": (4096, 1024, 14336, 0.86, 1.73),
    "Llama-3.1-70B": (8192, 1024, 28672, 0.87, 1.74),
}


def best_error_sq(delta: torch.Tensor, side_dim: int, nblocks: int, rank: int) -> float:
    """The squared error of the best blocks of rank ``rank``, by dense float64 SVDs."""
    blocks = delta.chunk(nblocks, dim=side_dim)
    return sum(float(torch.linalg.svdvals(block)[rank:].square().sum()) for block in blocks)


@settings(max_examples=30, deadline=None)
@given(
    inputs=st.integers(1, 5),
    outputs=st.integers(1, 5),
    rank=st.integers(1, 12),
    nblocks=st.sampled_from([2, 3, 4]),
    cut=st.integers(1, 6),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_equals_the_dense_svd_of_every_block(
    inputs: int, outputs: int, rank: int, nblocks: int, cut: int, dtype: torch.dtype, seed: int
) -> None:
    shape = (12 * inputs, 12 * outputs)
    with TemporaryDirectory() as folder:
        source = save_lora(Path(folder) / "lora", {Q: shape, O: shape}, rank, seed, dtype)
        options = ConvertOptions(nblocks, RankChoice(rank=cut * nblocks), dtype="float64", compute_dtype="float64")
        report = lora2bd(source, Path(folder) / "bd", options)
        expected, found = deltas(source), deltas(Path(folder) / "bd")
        for module, dim in ((Q, 0), (O, 1)):
            norm_sq = float(expected[module].square().sum())
            error_sq = float((found[module] - expected[module]).square().sum())
            best = best_error_sq(expected[module], dim, nblocks, cut)
            assert error_sq == pytest.approx(best, rel=1e-9, abs=1e-20 * norm_sq)
            own = next(m for m in report.modules if m.name == module)
            assert own.error**2 * norm_sq == pytest.approx(best, rel=1e-6, abs=1e-20 * norm_sq)
            assert own.rank == nblocks * min(cut, rank, shape[1 - dim] // nblocks), "no block has more rank than rows"


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 5e-3), ("float16", 1e-3)])
def test_in_the_files_own_type(dtype: str, tolerance: float, tmp_path: Path) -> None:
    source = save_lora(tmp_path / "lora", {Q: (64, 96), O: (96, 64)}, 16, dtype=getattr(torch, dtype))
    report = lora2bd(source, tmp_path / "bd", ConvertOptions(4, RankChoice(rank=16)))
    expected = deltas(source)
    for module, dim in ((Q, 0), (O, 1)):
        best = (best_error_sq(expected[module], dim, 4, 4) / float(expected[module].square().sum())) ** 0.5
        stored = relative_errors(source, tmp_path / "bd")[module]
        assert stored == pytest.approx(best, rel=tolerance)
        # The report counts the rounding of what is stored.
        assert next(m.error for m in report.modules if m.name == module) == pytest.approx(stored, rel=tolerance / 10)


def test_full_rank_leaves_the_rounding_and_reports_it(tmp_path: Path) -> None:
    source = save_lora(tmp_path / "lora", {Q: (64, 96), O: (96, 64)}, 8, dtype=torch.bfloat16)
    report = lora2bd(source, tmp_path / "bd", ConvertOptions(4, RankChoice(rank=32)))
    for module, error in relative_errors(source, tmp_path / "bd").items():
        assert 0 < error < 2**-7
        assert next(m.error for m in report.modules if m.name == module) == pytest.approx(error, rel=0.05)


def test_never_worse_than_the_leading_rows(tmp_path: Path) -> None:
    source = save_lora(tmp_path / "lora", {Q: (64, 96), O: (96, 64)}, 16)
    lora2bd(source, tmp_path / "bd", ConvertOptions(4, RankChoice(rank=32)))
    for module, error in relative_errors(source, tmp_path / "bd").items():
        b, a = dense_factors(source)[module]
        assert error < float(torch.linalg.norm(b @ a - b[:, :8] @ a[:8]) / torch.linalg.norm(b @ a))


def test_reblock_approximates_what_reblock_makes_exactly(tmp_path: Path) -> None:
    source = save_lora(tmp_path / "lora", {Q: (48, 48), O: (48, 48)}, 6)
    lora2bd(source, tmp_path / "two", ConvertOptions(2), lossless=True)
    reblock(tmp_path / "two", tmp_path / "three", ConvertOptions(3, RankChoice(rank=9)))
    lora2bd(source, tmp_path / "direct", ConvertOptions(3, RankChoice(rank=9)))
    for module, error in relative_errors(source, tmp_path / "three").items():
        assert error == pytest.approx(relative_errors(source, tmp_path / "direct")[module], rel=1e-5)


# --- How much rank -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", PAPER)
@pytest.mark.parametrize("multiple", [2, 4])
def test_the_papers_ratios_give_the_papers_ranks(model: str, multiple: int, tmp_path: Path) -> None:
    """Sizes divided by 16: every parameter count, and so the ratio, is the model's divided by 16."""
    hidden, kv, intermediate, *ratios = PAPER[model]
    d, k, i = hidden // 16, kv // 16, intermediate // 16
    shapes = {"q_proj": (d, d), "k_proj": (d, k), "v_proj": (d, k), "o_proj": (d, d)}
    shapes |= {"gate_proj": (d, i), "up_proj": (d, i), "down_proj": (i, d)}
    source = save_lora(tmp_path / "lora", {f"model.layers.0.{n}": s for n, s in shapes.items()}, 16)
    choice = RankChoice(param_ratio=ratios[multiple // 2 - 1])
    report = lora2bd(source, tmp_path / "bd", ConvertOptions(8, choice))
    assert {module.rank for module in report.modules} == {16 * multiple}
    assert report.param_ratio == pytest.approx(choice.param_ratio, abs=0.005)


def test_ratio_is_the_largest_that_fits(tmp_path: Path) -> None:
    source = save_lora(tmp_path / "lora", {Q: (48, 48), O: (48, 48)}, 8)
    for ratio in (0.4, 0.7, 1.0, 1.3, 2.0):
        report = lora2bd(source, tmp_path / f"bd-{ratio}", ConvertOptions(4, RankChoice(param_ratio=ratio)))
        assert report.param_ratio <= ratio + 0.005
        per_rank = 2 * (4 * 48 + 48) / (2 * 8 * 96)
        assert report.param_ratio + per_rank > ratio + 0.005


def test_max_error_takes_the_smallest_ranks(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.{m}": (48, 48) for i in range(3) for m in ("q_proj", "o_proj")}
    source = save_lora(tmp_path / "lora", shapes, 8)
    report = lora2bd(source, tmp_path / "bd", ConvertOptions(4, RankChoice(max_error=0.4)))
    errors, expected = relative_errors(source, tmp_path / "bd"), deltas(source)
    assert not report.above_max_error
    for module in report.modules:
        assert errors[module.name] <= 0.4
        delta, dim = expected[module.name], 0 if "q_proj" in module.name else 1
        one_less = best_error_sq(delta, dim, 4, module.rank // 4 - 1) / float(delta.square().sum())
        assert one_less > 0.4**2


def test_a_budget_goes_where_it_lowers_the_error_most(tmp_path: Path) -> None:
    shapes = {"model.layers.0.q_proj": (24, 24), "model.layers.0.up_proj": (24, 48), "model.layers.0.o_proj": (48, 24)}
    source = save_lora(tmp_path / "lora", shapes, 4, alpha_pattern={"up_proj": 80})
    choice = RankChoice(max_error=0.01, rank=4)
    report = lora2bd(source, tmp_path / "bd", ConvertOptions(2, choice))
    same = lora2bd(source, tmp_path / "same", ConvertOptions(2, RankChoice(rank=4)))
    assert report.parameters <= same.parameters
    assert report.error < same.error
    ranks = {module.name.rpartition(".")[2]: module.rank for module in report.modules}
    assert ranks == {"up_proj": 6, "q_proj": 4, "o_proj": 2}, "the module with the largest delta, then the cheapest"
    assert report.above_max_error


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.lists(st.floats(0, 10), min_size=3, max_size=3)), min_size=2, max_size=3),
    st.integers(0, 20),
)
def test_greedy_against_every_choice(modules: list[tuple[int, list[float]]], extra: int) -> None:
    """No choice of the same or fewer parameters has a smaller error than greedy's, for what greedy spends."""
    costs = {str(i): ModuleCost(10 * cost, 3) for i, (cost, _) in enumerate(modules)}
    energies = {str(i): torch.tensor(sorted(e, reverse=True), dtype=torch.float64) for i, (_, e) in enumerate(modules)}
    budget = spent(costs, dict.fromkeys(costs, 1)) + 10 * extra
    ranks = greedy(costs, energies, budget, dict.fromkeys(costs, 3))
    used, error = spent(costs, ranks), sum(float(tail_energies(energies[n])[r]) for n, r in ranks.items())
    assert used <= budget
    equal_costs = len({cost.parameters for cost in costs.values()}) == 1
    for choice in itertools.product((1, 2, 3), repeat=len(costs)):
        other = dict(zip(costs, choice, strict=True))
        if equal_costs and spent(costs, other) <= used:
            assert error <= sum(float(tail_energies(energies[n])[r]) for n, r in other.items()) + 1e-9
    assert all(costs[n].parameters > budget - used or r == 3 for n, r in ranks.items()), "what still fits is spent"
