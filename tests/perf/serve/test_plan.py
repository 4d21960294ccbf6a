"""What is run, in which order, and with which command line, before anything is started."""

from dataclasses import replace

import pytest

from bdlora_perf.serve.load import _checked, generator_arguments
from bdlora_perf.serve.sweep import schedule
from bdlora_perf.serve.systems import SYSTEMS, choose_systems
from bdlora_perf.serve.workload import PRESETS, Sweep, Workload
from bdlora_sglang.errors import BDLoRAError

SKEWED = Workload(4, None, 64, 16, 0.5, 3, "skewed", 8, 12)
NAMES = ["adapter-0", "adapter-1", "adapter-2"]


def order(keep_servers: bool, rounds: int = 3) -> list[list[tuple[int, str, int | None]]]:
    points = Sweep(concurrency=(1, 2)).workloads()
    batches = schedule(["a", "b", "c"], points, rounds, keep_servers)
    return [[(turn.round, turn.system, turn.workload.concurrency) for turn in batch] for batch in batches]


def test_kept_servers_take_turns_at_each_point_and_each_is_first_once() -> None:
    (turns,) = order(keep_servers=True)
    assert turns[:9] == [
        *((1, "a", 1), (1, "b", 1), (1, "c", 1), (1, "b", 2), (1, "c", 2), (1, "a", 2)),
        *((2, "b", 1), (2, "c", 1), (2, "a", 1)),
    ]
    firsts = [turns[i][1] for i in range(0, len(turns), 3)]
    assert sorted(firsts) == sorted("abc" * 2)
    assert len(set(turns)) == len(turns) == 3 * 3 * 2


def test_restarted_servers_run_every_point_of_a_round_one_after_the_other() -> None:
    batches = order(keep_servers=False, rounds=2)
    assert batches == [
        [(round_, system, 1), (round_, system, 2)] for round_, system in zip([1] * 3 + [2] * 3, "abcbca", strict=True)
    ]


@pytest.mark.parametrize("keep_servers", [True, False], ids=["kept", "restarted"])
def test_servers_of_a_batch_hold_the_same_adapters(keep_servers: bool) -> None:
    points = Sweep(concurrency=(1, 2), adapters=(2, 4), rank=(8, 16)).workloads()
    batches = schedule(["a", "b"], points, 2, keep_servers)
    assert all(len({turn.workload.deployment for turn in batch}) == 1 for batch in batches)
    assert len(batches) == (4 if keep_servers else 4 * 2 * 2)
    assert sum(map(len, batches)) == 8 * 2 * 2


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_run(name: str) -> None:
    preset = PRESETS[name]
    workloads = preset.sweep.workloads()
    assert len(set(workloads)) == len(workloads) > 0
    for system in choose_systems(preset.systems, has_gpu=True):
        for workload in workloads:
            system.adapter(workload.rank, preset.tp)


def test_number_of_prompts_follows_the_load() -> None:
    assert [w.num_prompts for w in Sweep(concurrency=(1, 32)).workloads()] == [16, 128]
    assert [w.num_prompts for w in Sweep(concurrency=(), request_rate=(0.1, 2.5)).workloads()] == [16, 150]


def test_matched_shapes() -> None:
    shapes = {name: system.adapter(16, 8) for name, system in SYSTEMS.items()}
    found = {name: (shape.rank, shape.nblocks) for name, shape in shapes.items() if shape}
    plain = (16, None)
    assert found == {
        "bd-2r": (32, 8),
        "bd-4r": (64, 8),
        "lora": plain,
        "lora-fully-sharded": plain,
        "sglang-csgmv": plain,
        "sglang-triton-v2": plain,
    }


def test_command_line_of_the_generator() -> None:
    arguments = generator_arguments("http://h:1", SKEWED, [*NAMES, "unused"], "model", ["ttft:9"], seed=7)
    expected = (
        "--backend sglang --base-url http://h:1 --dataset-name random-ids --tokenize-prompt --random-input-len 64 "
        "--random-output-len 16 --random-range-ratio 0.5 --num-prompts 12 --max-concurrency 4 --model model "
        "--tokenizer model --lora-name adapter-0 adapter-1 adapter-2 --lora-request-distribution skewed "
        "--lora-zipf-alpha 1.5 --goodput ttft:9 --warmup-requests 4 --flush-cache --seed 7 --disable-tqdm "
        "--output-details"
    )
    assert arguments == expected.split()


def test_identical_requests_name_one_adapter_and_the_base_model_none() -> None:
    identical = replace(SKEWED, distribution="identical", concurrency=None, request_rate=2.5)
    arguments = generator_arguments("http://h:1", identical, NAMES, None, [], seed=0)
    assert arguments[arguments.index("--lora-name") + 1 :][:2] == ["adapter-0", "--warmup-requests"]
    assert arguments[arguments.index("--request-rate") + 1] == "2.5"
    assert not {"--max-concurrency", "--lora-request-distribution", "--goodput", "--tokenizer"} & set(arguments)
    assert "--lora-name" not in generator_arguments("http://h:1", identical, [], None, [], seed=0)


def test_a_run_with_failed_requests_is_a_failure() -> None:
    result = {"completed": 2, "errors": ["", "Bad Request: no such adapter", ""]}
    with pytest.raises(BDLoRAError, match=r"1 of 3 requests failed.*no such adapter"):
        _checked(result)
    assert _checked({"completed": 1, "errors": [""]})["completed"] == 1


def test_a_server_with_too_few_adapters_is_refused() -> None:
    with pytest.raises(BDLoRAError, match="--adapters 3: found 2 on the server"):
        generator_arguments("http://h:1", SKEWED, NAMES[:2], None, [], seed=0)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (Sweep(request_rate=(1.0,)), "--concurrency, --request-rate: found .* expected one of them"),
        (Sweep(concurrency=()), "expected one of them"),
        (Sweep(concurrency=(9,), distribution=("distinct",)), "--adapters 8: found distinct .* 9 in flight"),
        (Sweep(adapters=(1,), distribution=("skewed",)), "--adapters 1: found skewed .* two adapters at least"),
    ],
    ids=["both-loads", "no-load", "too-few-distinct", "one-skewed"],
)
def test_impossible_sweeps_are_refused(sweep: Sweep, message: str) -> None:
    with pytest.raises(BDLoRAError, match=message):
        sweep.workloads()


def test_systems_that_do_not_run_here_are_refused_or_left_out() -> None:
    assert not any(system.needs_gpu for system in choose_systems((), has_gpu=False))
    assert len(choose_systems((), has_gpu=True)) == len(SYSTEMS)
    with pytest.raises(BDLoRAError, match="'sglang-csgmv', which needs a GPU"):
        choose_systems(["base", "sglang-csgmv"], has_gpu=False)
    with pytest.raises(BDLoRAError, match=r"--systems: found 'vllm', expected names out of base, bd-2r"):
        choose_systems(["vllm"], has_gpu=True)
    with pytest.raises(BDLoRAError, match="--rank 2: found rank 4 for bd-2r, expected a multiple of TP 8"):
        SYSTEMS["bd-2r"].adapter(2, 8)
