"""Collectives in traces: at the level of SGLang's groups, in nested operations and in replayed graphs."""

from collections import Counter
from typing import Any

from bdlora_perf.collectives.count import Collective, collectives
from bdlora_perf.collectives.formulas import added_by_lora, agree
from bdlora_perf.collectives.forwards import forwards


def event(name: str, ts: float, dur: float, shape: list[int] | None = None, **fields: Any) -> dict[str, Any]:
    arguments = {"Input Dims": [shape, []] if shape else [], **fields.pop("args", {})}
    return {"name": name, "ts": ts, "dur": dur, "pid": 1, "tid": 1, "args": arguments, **fields}


def test_an_operation_inside_another_counts_once() -> None:
    """SGLang's in-place all-reduce ends in PyTorch's; one on another thread is another."""
    events = [
        event("c10d::allreduce_", 12, 3, [4, 8]),
        event("sglang::inplace_all_reduce", 10, 9, [4, 8]),
        event("c10d::allreduce_", 12, 3, [2, 2], tid=2),
        event("sglang::reg_all_gather_into_tensor", 30, 9, [4, 8]),
        event("c10d::broadcast_", 50, 1, [4, 8]),
    ]
    assert Counter(found for _, found in collectives(events)) == {
        Collective("all_reduce", (4, 8)): 1,
        Collective("all_reduce", (2, 2)): 1,
        Collective("all_gather", (4, 8)): 1,
    }


def test_replayed_graphs_are_held_to_the_formula_by_kind() -> None:
    expected = added_by_lora(True, 4, 16, 3, 2)
    assert agree(expected, expected)
    assert not agree(expected - Counter({Collective("all_reduce", (4, 16)): 1}), expected)
    replayed = Counter({Collective("all_gather", None): 6, Collective("all_reduce", None): 6})
    assert agree(replayed, expected) and not agree(replayed + Counter({Collective("all_reduce", None): 1}), expected)


def test_kernels_of_a_replayed_graph_count_and_those_of_a_called_operation_do_not() -> None:
    nccl, custom = (
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage)",
        "void cross_device_reduce_1stage<bf16, 8>",
    )
    events = [
        event("step[EXTEND bs=4 toks=16]", 0, 100),
        event("sglang::outplace_all_reduce", 10, 5, [4, 8], args={"correlation": 7}),
        event(custom, 20, 5, cat="kernel", tid=9, args={"correlation": 7}),
        event("step[DECODE bs=4]", 200, 100),
        event("cudaGraphLaunch", 201, 2, args={"correlation": 8}),
        event(custom, 210, 5, cat="kernel", tid=9, args={"correlation": 8}),
        event(nccl, 220, 15, cat="kernel", tid=9, args={"correlation": 8}),
        event("void gemm_kernel", 240, 9, cat="kernel", tid=9, args={"correlation": 8}),
    ]
    prefill, decode = forwards(events)
    assert prefill.collectives == {Collective("all_reduce", (4, 8)): 1}
    assert decode.collectives == {Collective("all_reduce", None): 1, Collective("all_gather", None): 1}
    assert decode.parts["collectives"] == 0.02
