"""What LoRA's kernels are made of, ours and SGLang's, for a GPU that is not there: read from machine code, not timed.

Run ``python -m bdlora_perf.kernels.static --capability 90 --output DIR``. It needs torch, Triton and SGLang, and no
GPU: kernels are launched by their own host code on PyTorch's "meta" device (`bdlora_perf.kernels.absent_gpu`).
"""

import argparse
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
from sglang.kernels.ops.lora.common.lora_b import SliceGeometry, grouped_lora_b, per_row_lora_b
from sglang.kernels.ops.lora.dense.chunked_sgmv_expand import _chunked_lora_expand_kernel
from sglang.kernels.ops.lora.dense.chunked_sgmv_shrink import _chunked_lora_shrink_kernel
from sglang.kernels.ops.lora.dense.lora_tuning_config import DEFAULT_EXPAND_CONFIG, DEFAULT_SHRINK_CONFIG
from sglang.srt.lora.dense.plan import BFamily

from bdlora_kernels.configurations import ARCHITECTURES, load_configurations
from bdlora_kernels.launch import Scratch, expand_launch, shape_of, shrink_launch
from bdlora_kernels.layout import LayerFactors
from bdlora_kernels.tables import SegmentTable, SliceTables
from bdlora_perf.kernels.absent_gpu import Launched, absent_gpu
from bdlora_perf.kernels.problem import Problem
from bdlora_perf.kernels.sglang_contenders import CHUNK_SIZE, batch_info, triton_v2_runner
from bdlora_perf.kernels.shapes import LAYERS, MODELS, Case

META = torch.device("meta")


@dataclass(frozen=True)
class Architecture:
    """Of one multiprocessor and how many there are: NVIDIA's tuning guides for Ampere, Hopper and Blackwell."""

    multiprocessors: int
    registers: int = 65536
    warps: int = 64
    programs: int = 32
    shared: int = 227 * 1024


KNOWN = {80: Architecture(108, shared=163 * 1024), 90: Architecture(132), 100: Architecture(148)}


def ours(problem: Problem, capability: int) -> None:
    """Launch shrink and expand."""
    shape, tokens = problem.case.shape(), problem.case.tokens
    configurations = load_configurations(capability)
    tables = SliceTables.allocate(problem.num_slots, problem.rank, problem.rank * len(shape.outputs), META)
    segments = SegmentTable(tokens, problem.num_slots, configurations.block_tokens(decode=True), META)
    elements = problem.a_NSRI[0, 0].numel() + problem.b_NSOr[0, 0].numel()
    slots_SE = torch.empty(problem.num_slots, elements, dtype=problem.x_TI.dtype, device=META)
    factors = LayerFactors(slots_SE, slots_SE, [()] * problem.num_slots)
    scratch = Scratch.for_segments(segments, configurations, tables.h_size, META)
    configuration = configurations.choose(shape_of(problem.x_TI, shape.total_outputs, tables, segments))
    h_TR = scratch.h_TR(tokens, tables.h_size)
    shrink_launch(h_TR, problem.x_TI, factors, tables, segments, scratch.partial, configuration).run()
    expand_launch(problem.y_TO, h_TR, slots_SE, tables.expand, segments, configuration).run()


def csgmv(problem: Problem, capability: int) -> None:
    """Launch SGLang's csgmv with its default blocks; its own host code asks the GPU for its name to find tuned ones."""
    info, starts = batch_info(problem, CHUNK_SIZE), tuple(problem.output_starts)
    x_TI, a_SRI, b_SOr = problem.x_TI, problem.a_NSRI[0], problem.b_NSOr[0]
    (_, rows, inputs), (_, outputs, rank), slices = a_SRI.shape, b_SOr.shape, len(starts) - 1
    h_TR = torch.empty(len(x_TI), rows, dtype=x_TI.dtype, device=META)
    batch = info.seg_indptr, info.weight_indices, info.lora_ranks, info.permutation, info.num_segments
    _chunked_lora_shrink_kernel[(-(-rows // DEFAULT_SHRINK_CONFIG["BLOCK_N"]), info.num_segments)](
        x_TI, a_SRI, h_TR, *batch,
        N=rows, K=inputs, NUM_SLICES=slices, BLOCK_M=CHUNK_SIZE, **DEFAULT_SHRINK_CONFIG,
    )  # fmt: skip
    tiles = sum(-(-(stop - start) // DEFAULT_EXPAND_CONFIG["BLOCK_N"]) for start, stop in pairwise(starts))
    _chunked_lora_expand_kernel[(tiles, info.num_segments)](
        h_TR, b_SOr, problem.y_TO, *problem.y_TO.stride(), *batch, info.scalings, torch.empty(4, device=META).int(),
        NUM_SLICES=slices, OUTPUT_DIM=outputs, MAX_RANK=rank, BLOCK_M=CHUNK_SIZE, SLICE_OFFSETS=starts,
        **DEFAULT_EXPAND_CONFIG,
    )  # fmt: skip


def triton_v2(problem: Problem, capability: int) -> None:
    """Launch SGLang's triton_v2 by the plan of its runner; where that is one cuBLAS product with A, only B is here."""
    architecture = "sm90" if capability // 10 == 9 else "sm100" if capability >= 100 else "default"
    runner, plan, offsets = triton_v2_runner(problem, architecture)
    bridge = runner.run_a(problem.x_TI, problem.a_NSRI[0], stack=len(offsets) - 1, plan=plan)
    # Its own `slice_geometry` wants a GPU for the table of offsets.
    block, widths = plan.b_tiles["BLOCK_SIZE_N"], [stop - start for start, stop in pairwise(offsets)]
    uniform = widths[0] if len(set(widths)) == 1 else 0
    table = torch.empty(16, dtype=torch.int32, device=META)
    geometry = SliceGeometry(
        table[: len(offsets)], table[8:], len(widths), sum(-(-width // block) for width in widths), uniform,
        uniform, all(width % block == 0 for width in widths), block,
    )  # fmt: skip
    common = {"geometry": geometry, "config": plan.b_tiles, "add_inplace": True, "zero_sentinel": False}
    common |= {"lora_ranks": runner.lora_ranks, "scalings": runner.scalings, "planes": bridge.planes}
    if plan.b_family is BFamily.GROUPED:
        route = runner.route(plan.block_size)
        grouped_lora_b(bridge.tensor, problem.b_NSOr[0], problem.y_TO, route, **common)
    else:
        common["slot_planes"] = bridge.slot_planes
        per_row_lora_b(bridge.tensor, problem.b_NSOr[0], problem.y_TO, runner.raw_route(), **common)


SYSTEMS: Mapping[str, Callable[[Problem, int], None]] = {"bdlora": ours, "csgmv": csgmv, "triton_v2": triton_v2}


def meta_problem(case: Case, rank: int) -> Problem:
    """A problem without memory."""
    shape = case.shape()

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=getattr(torch, case.dtype), device=META)

    return Problem(
        case=case,
        rank=rank,
        slots_T=case.slots(),
        x_TI=empty(case.tokens, shape.inputs),
        y_TO=empty(case.tokens, shape.total_outputs),
        a_NSRI=empty(1, case.adapters, rank * len(shape.outputs), shape.inputs),
        b_NSOr=empty(1, case.adapters, shape.total_outputs, rank),
    )


def describe(launched: Launched, architecture: Architecture) -> dict[str, object]:
    """A launch, how many of its programs a multiprocessor holds, and in how many waves they run."""
    code = launched.code
    # Registers are given out by 8 a thread, shared memory with 1 KiB a program that the system keeps.
    by_registers = architecture.registers // (-(-code.registers // 8) * 8 * 32 * code.warps)
    by_shared = architecture.shared // (code.shared + 1024)
    resident = min(by_registers, by_shared, architecture.warps // code.warps, architecture.programs)
    return {
        "kernel": code.name,
        "programs": launched.programs,
        "warps": code.warps,
        "registers": code.registers,
        "spilled_bytes": code.stack,
        "shared_bytes": code.shared,
        "resident": resident,
        "waves": round(launched.programs / (resident * architecture.multiprocessors), 2),
    }


def decode_cases(model: str, rank: int) -> Iterable[Case]:
    for tokens, adapters in ((1, 1), (8, 8), (32, 8), (32, 32), (64, 32), (256, 8), (256, 32)):
        for layer in LAYERS:
            yield Case(model, 8, layer, "decode", tokens, adapters, "uniform", rank)


def read_all(capability: int, rank: int) -> list[dict[str, object]]:
    """Every launch of every system in decode, on the same factors."""
    rows: list[dict[str, object]] = []
    for case in decode_cases(next(iter(MODELS)), rank):
        for name, launch in SYSTEMS.items():
            with absent_gpu(capability) as launches:
                launch(meta_problem(case, rank), capability)
            # The route of a batch is made once for all layers.
            mine = [launched for launched in launches if "route" not in launched.code.name]
            rows += [
                {**{field: asdict(case)[field] for field in ("layer", "tokens", "adapters", "rank")}, "system": name}
                | describe(launched, KNOWN[capability])
                for launched in mine
            ]
    return rows


def markdown(rows: list[dict[str, object]], title: str) -> str:
    names = list(rows[0])
    lines = [f"# {title}", "", "| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    lines += ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, choices=ARCHITECTURES, default=90)
    parser.add_argument("--rank", type=int, default=8, help="local rank")
    parser.add_argument("--output", type=Path, required=True, help="folder for report.json and report.md")
    arguments = parser.parse_args()
    rows = read_all(arguments.capability, arguments.rank)
    title = f"Machine code for sm_{arguments.capability}, Triton {triton.__version__}: nothing is timed"
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("report.json", json.dumps({"title": title, "rows": rows}, indent=1) + "\n"),
        ("report.md", markdown(rows, title)),
    ):
        temporary = arguments.output / f".{name}.{os.getpid()}"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, arguments.output / name)


if __name__ == "__main__":
    main()
