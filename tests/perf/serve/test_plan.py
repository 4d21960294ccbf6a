"""What is run, in which order, with which requests, and what is made of the answers, before anything is started."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bdlora_perf.collectives.count import Collective
from bdlora_perf.collectives.formulas import added_by_lora
from bdlora_perf.estimate.model_shape import load_shape
from bdlora_perf.serve.load import Outcome, make_requests
from bdlora_perf.serve.metrics import run_metrics
from bdlora_perf.serve.run import schedule
from bdlora_perf.serve.systems import SYSTEMS, choose_systems, matched_system
from bdlora_perf.serve.trace import read_trace
from bdlora_perf.serve.workload import PRESETS, Sweep, Workload
from bdlora_sglang.errors import BDLoRAError

ZIPF = Workload(4, None, 64, 16, 0.5, 3, 3, "zipf", 1.0, 8, 1200)
NAMES = ["adapter-0", "adapter-1", "adapter-2"]


def order(keep_servers: bool, seed: int = 0) -> list[list[tuple[int, str, int | None]]]:
    points = Sweep(concurrency=(1, 2)).workloads()
    batches = schedule(["a", "b", "c"], points, 3, keep_servers, seed)
    return [[(turn.round, turn.system, turn.workload.concurrency) for turn in batch] for batch in batches]


def test_kept_servers_take_turns_at_each_point_in_an_order_that_the_seed_draws() -> None:
    (turns,) = order(keep_servers=True)
    assert [(round_, load) for round_, _, load in turns] == [(r, c) for r in (1, 2, 3) for c in (1, 2) for _ in "abc"]
    orders = ["".join(system for _, system, _ in turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert all(sorted(found) == ["a", "b", "c"] for found in orders) and len(set(orders)) > 2
    assert order(keep_servers=True) == [turns] != order(keep_servers=True, seed=1)


def test_restarted_servers_run_every_point_of_a_round_one_after_the_other() -> None:
    batches = order(keep_servers=False)
    assert [[(round_, load) for round_, _, load in batch] for batch in batches] == [
        [(round_, 1), (round_, 2)] for round_ in (1, 2, 3) for _ in "abc"
    ]
    assert all(len({system for _, system, _ in batch}) == 1 for batch in batches)


@pytest.mark.parametrize("keep_servers", [True, False], ids=["kept", "restarted"])
def test_servers_of_a_batch_hold_the_same_adapters(keep_servers: bool) -> None:
    points = Sweep(concurrency=(1, 2), adapters=(2, 4), rank=(8, 16)).workloads()
    batches = schedule(["a", "b"], points, 2, keep_servers, 0)
    assert all(len({turn.workload.deployment for turn in batch}) == 1 for batch in batches)
    assert len(batches) == (4 if keep_servers else 4 * 2 * 2)
    assert sum(map(len, batches)) == 8 * 2 * 2


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_run(name: str) -> None:
    preset = PRESETS[name]
    workloads = preset.sweep.workloads()
    assert len(set(workloads)) == len(workloads) > 0
    assert {"lora", "lora-fully-sharded"} <= set(preset.systems)
    for system in choose_systems(preset.systems, True, preset.param_ratio):
        for workload in workloads:
            system.adapter(workload.rank, preset.tp, load_shape("llama-3.1-8b"))


def test_number_of_prompts_is_enough_for_a_99th_percentile() -> None:
    assert [w.num_prompts for w in Sweep(concurrency=(1, 32)).workloads()] == [100, 256]
    assert [w.num_prompts for w in Sweep(concurrency=(), request_rate=(0.1, 2.5)).workloads()] == [100, 150]


def test_shapes_by_rank() -> None:
    shapes = {name: system.adapter(16, 8) for name, system in SYSTEMS.items()}
    found = {name: (shape.rank, shape.nblocks) for name, shape in shapes.items() if shape}
    plain = dict.fromkeys(("lora", "lora-fully-sharded", "sglang-csgmv", "sglang-triton-v2"), (16, None))
    assert found == {"bd-2r": (32, 8), "bd-4r": (64, 8), **plain}


def test_what_lora_adds_to_a_layer() -> None:
    """As the formulas count it, which running servers are held to (`test_engine.py`, `bdlora perf collectives`)."""
    for name, system in SYSTEMS.items():
        shape = system.adapter(16, 8)
        added: Counter[Collective] = Counter()
        if name == "sglang-csgmv":  # o's and down's shrink outputs, beside the layers' own
            added[Collective("all_reduce", None)] = 2
        elif shape is not None:
            added = added_by_lora(name == "lora-fully-sharded", 4, shape.rank, 1, 8)
        counts = Counter(collective.operation for collective in added.elements())
        words = [f"{count} {operation.replace('_', '-')}s" for operation, count in sorted(counts.items())]
        assert system.collectives == (", ".join(words) or "none"), name
        assert system.launches == (0 if shape is None else 2 * 4)


@pytest.mark.parametrize(("ratio", "tp", "rank"), [(0.87, 8, 32), (1.0, 8, 32), (1.0, 2, 22), (1.35, 2, 32)])
def test_shapes_by_parameters(ratio: float, tp: int, rank: int) -> None:
    """Llama-3.1-70B: BD-LoRA of rank 2r has 0.87 of LoRA's parameters at 8 blocks; one of 2 blocks has 1.35."""
    shape = matched_system(ratio).adapter(16, tp, load_shape("llama-3.1-70b"))
    assert shape is not None and (shape.rank, shape.nblocks) == (rank, tp)


def test_requests_are_the_same_for_every_system_and_others_in_every_round() -> None:
    first = make_requests(ZIPF, NAMES, 1)
    base = make_requests(ZIPF, [], 1)
    assert [r.prompt for r in first] == [r.prompt for r in base] and {r.adapter for r in base} == {None}
    assert make_requests(ZIPF, NAMES, 1) == first != make_requests(ZIPF, NAMES, 2)
    assert {len(r.prompt) for r in first} == set(range(32, 65)) and {r.output_len for r in first} == set(range(8, 17))


def test_zipf_by_its_weights() -> None:
    """1, 1/2 and 1/3 of 11/6."""
    asked = Counter(request.adapter for request in make_requests(ZIPF, NAMES, 0))
    assert [asked[name] / 1200 for name in NAMES] == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.04)


def test_arrivals_are_a_poisson_process() -> None:
    workload = replace(ZIPF, concurrency=None, request_rate=4.0)
    gaps = np.diff([request.at or 0.0 for request in make_requests(workload, NAMES, 0)])
    assert np.mean(gaps) == pytest.approx(0.25, rel=0.1) and np.std(gaps) == pytest.approx(0.25, rel=0.15)


def test_a_trace_is_replayed(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"timestamp": 3000, "input_length": 5, "output_length": 2, "hash_ids": [1]}\n\n'
        '{"timestamp": 1000, "input_len": 7, "max_tokens": 3, "adapter": "sql"}\n'
    )
    trace = read_trace(path, speed=2)
    assert [(t.input_len, t.output_len, t.at, t.adapter) for t in trace] == [(7, 3, 0.0, 0), (5, 2, 1.0, None)]
    (workload,) = Sweep(concurrency=(), trace=trace, adapters=(3,)).workloads()
    requests = make_requests(workload, NAMES, 0)
    assert [(len(r.prompt), r.output_len, r.at) for r in requests] == [(7, 3, 0.0), (5, 2, 1.0)]
    assert requests[0].adapter == "adapter-0"
    for line in ("not JSON", '{"input_length": 5}', '{"input_length": 0, "output_length": 1}'):
        path.write_text(line + "\n")
        with pytest.raises(BDLoRAError, match="line 1: found"):
            read_trace(path)
    path.write_text(
        '{"input_length": 5, "output_length": 1}\n{"timestamp": 1, "input_length": 5, "output_length": 1}\n'
    )
    with pytest.raises(BDLoRAError, match="found 1 timestamps in 2 requests"):
        read_trace(path)


def outcome(start: float, latency: float, adapter: str | None = "a", error: str = "") -> Outcome:
    """Eleven tokens, the first after a tenth of the latency."""
    return Outcome(adapter, start, latency / 10, latency, (0.09 * latency,) * 10, 30, 0 if error else 11, error)


def test_figures_of_a_run_by_hand() -> None:
    """Two answers and a failure: 22 tokens from 0 to 4 s."""
    found = run_metrics([outcome(0, 2), outcome(1, 3), outcome(2, 9, error="500")], 1.5, {"ttft": 250, "e2el": 9000})
    expected = {
        "failed_requests": 1, "offered_rate": 1.5, "output_throughput": 5.5, "input_throughput": 15,
        "request_throughput": 0.5, "average_concurrency": 1.25, "request_goodput": 0.25, "slo_attainment": 1 / 3,
        "mean_ttft_ms": 250, "median_e2e_latency_ms": 2500, "median_tpot_ms": 225, "median_itl_ms": 225,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert not any(name.startswith(("p90", "p95", "p99")) for name in found)


def test_a_percentile_takes_as_many_requests_as_it_needs() -> None:
    outcomes = [outcome(i, 1 + i / 100) for i in range(100)]
    found = run_metrics(outcomes, None, {})
    assert found["p99_e2e_latency_ms"] == pytest.approx(1000 * np.quantile([1 + i / 100 for i in range(100)], 0.99))
    assert "p99_e2e_latency_ms" not in run_metrics(outcomes[:99], None, {})
    assert "fairness" not in found


def test_fairness_over_adapters() -> None:
    """One adapter waits three times as long: Jain's index is (1 + 3)^2 / (2 (1 + 9))."""
    outcomes = [outcome(i, 3 if i % 2 else 1, "ab"[i % 2]) for i in range(40)]
    found = run_metrics([*outcomes, outcome(50, 99, "seldom")], None, {})
    assert found["fairness"] == pytest.approx(0.8)
    assert found["worst_adapter_p99_e2e_latency_ms"] == pytest.approx(3000)


def test_nothing_succeeded() -> None:
    assert run_metrics([outcome(0, 1, error="x")], None, {"ttft": 1}) == {"failed_requests": 1}


def test_a_server_with_too_few_adapters_is_refused() -> None:
    with pytest.raises(BDLoRAError, match="--adapters 3: found 2 on the server"):
        make_requests(ZIPF, NAMES[:2], 0)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (Sweep(request_rate=(1.0,)), "--concurrency, --request-rate, --trace: found .* expected one of them"),
        (Sweep(concurrency=()), "expected one of them"),
        (Sweep(concurrency=(9,), distribution=("distinct",)), "--adapters 8: found distinct .* 9 in flight"),
        (Sweep(adapters=(1,), distribution=("zipf",)), "--adapters 1: found zipf .* two adapters at least"),
    ],
    ids=["both-loads", "no-load", "too-few-distinct", "one-zipf"],
)
def test_impossible_sweeps_are_refused(sweep: Sweep, message: str) -> None:
    with pytest.raises(BDLoRAError, match=message):
        sweep.workloads()


def test_more_adapters_than_slots() -> None:
    (workload,) = Sweep(concurrency=(1,), adapters=(64,), slots=8).workloads()
    assert workload.deployment == (64, 8, 16) and workload.point()["slots"] == 8
    (workload,) = Sweep(concurrency=(1,), adapters=(4,), slots=8).workloads()
    assert workload.slots == 4
    assert set(workload.choose(random.Random(0))) == set(range(4))


def test_systems_that_do_not_run_here_are_refused_or_left_out() -> None:
    assert not any(system.needs_gpu for system in choose_systems((), has_gpu=False))
    assert len(choose_systems((), has_gpu=True)) == len(SYSTEMS)
    assert choose_systems(["base"], False, [0.5, 0.5, 2])[1:] == [matched_system(0.5), matched_system(2)]
    with pytest.raises(BDLoRAError, match="'sglang-csgmv', which needs a GPU"):
        choose_systems(["base", "sglang-csgmv"], has_gpu=False)
    with pytest.raises(BDLoRAError, match=r"--systems: found 'vllm', expected names out of base, bd-2r"):
        choose_systems(["vllm"], has_gpu=True)
    with pytest.raises(BDLoRAError, match="--rank 2: found rank 4 for bd-2r, expected a multiple of TP 8"):
        SYSTEMS["bd-2r"].adapter(2, 8)
    with pytest.raises(BDLoRAError, match=r"--param-ratio 0\.1: found 0\.44 .*smallest rank, 8"):
        matched_system(0.1).adapter(8, 8, load_shape("llama-3.1-70b"))
