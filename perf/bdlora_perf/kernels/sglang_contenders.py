"""SGLang's own LoRA kernels, called as its backends ``csgmv``, ``triton`` and ``triton_v2`` call them."""

from collections.abc import Mapping
from functools import partial

import torch
from sglang.kernels.ops.lora.dense.chunked_sgmv_expand import chunked_sgmv_lora_expand_forward
from sglang.kernels.ops.lora.dense.chunked_sgmv_shrink import chunked_sgmv_lora_shrink_forward
from sglang.kernels.ops.lora.dense.gate_up_lora_b import gate_up_lora_b_fwd
from sglang.kernels.ops.lora.dense.qkv_lora_b import qkv_lora_b_fwd
from sglang.kernels.ops.lora.dense.sgemm_lora_a import sgemm_lora_a_fwd
from sglang.kernels.ops.lora.dense.sgemm_lora_b import sgemm_lora_b_fwd
from sglang.srt.lora.dense.plan import DenseLoraKind, DensePlan
from sglang.srt.lora.dense.runner import DenseLoraRunner
from sglang.srt.lora.utils import LoRABatchInfo, Phase
from sglang.srt.lora.workspace import LoraWorkspace

from bdlora_perf.kernels.problem import SCALING, Call, Contender, Problem, base_product

# --max-lora-chunk-size of SGLang 0.5.23.
CHUNK_SIZE = 16


def batch_info(problem: Problem, max_length: int | None) -> LoRABatchInfo:
    """Tokens sorted by slot; with a ``max_length``, in segments of at most so many tokens, else one segment a slot."""
    device = problem.x_TI.device
    slots_T = torch.tensor(problem.slots_T)
    counts = torch.bincount(slots_T, minlength=problem.case.adapters).tolist()
    segments = [
        (slot, min(max_length or count, count - start))
        for slot, count in enumerate(counts)
        for start in range(0, count, max_length or count or 1)
    ]
    lengths = [length for _, length in segments]

    def ints(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return LoRABatchInfo(
        use_cuda_graph=False,
        bs=len(segments),
        num_segments=len(segments),
        seg_indptr=ints([0, *torch.tensor(lengths).cumsum(0).tolist()]),
        weight_indices=ints([slot for slot, _ in segments]),
        lora_ranks=ints([problem.case.rank] * problem.case.adapters),
        scalings=torch.full((problem.case.adapters,), SCALING, device=device),
        max_len=max_length or max(lengths),
        seg_lens=ints(lengths),
        permutation=ints(slots_T.argsort(stable=True).tolist()),
    )


def prepare_csgmv(problem: Problem) -> Call:
    info = batch_info(problem, CHUNK_SIZE)
    outputs = problem.case.shape().outputs
    offsets_cpu = torch.tensor(problem.output_starts, dtype=torch.int32)
    offsets = offsets_cpu.to(problem.x_TI.device)

    def call(n: int) -> None:
        h = chunked_sgmv_lora_shrink_forward(problem.x_TI, problem.a_NSRI[n], info, len(outputs))
        chunked_sgmv_lora_expand_forward(
            h, problem.b_NSOr[n], info, offsets, max(outputs), problem.y_TO, slice_offsets_cpu=offsets_cpu
        )

    return call


def prepare_triton(problem: Problem) -> Call:
    info = batch_info(problem, None)
    outputs = problem.case.shape().outputs
    offsets = torch.tensor(problem.output_starts, dtype=torch.int32, device=problem.x_TI.device)

    def call(n: int) -> None:
        h = sgemm_lora_a_fwd(problem.x_TI, problem.a_NSRI[n], info, stack_num=len(outputs))
        if len(outputs) == 3:
            qkv_lora_b_fwd(h, problem.b_NSOr[n], info, offsets, max(outputs), problem.y_TO)
        elif len(outputs) == 2:
            gate_up_lora_b_fwd(h, problem.b_NSOr[n], info, outputs[0], problem.y_TO)
        else:
            sgemm_lora_b_fwd(h, problem.b_NSOr[n], info, problem.y_TO)

    return call


def triton_v2_runner(
    problem: Problem, architecture: str | None = None, runner_class: type[DenseLoraRunner] = DenseLoraRunner
) -> tuple[DenseLoraRunner, DensePlan, tuple[int, ...]]:
    """SGLang's runner with the batch, the plan that it chooses (for this GPU, or an ``architecture`` such as "sm90"),
    and where the slices' outputs start and end."""
    device, case = problem.x_TI.device, problem.case
    offsets, tokens = tuple(problem.output_starts), len(problem.slots_T)
    runner = runner_class(LoraWorkspace(), max_loras=case.adapters, device=device, architecture=architecture)
    runner.begin_batch(
        token_slots=torch.tensor(problem.slots_T, dtype=torch.int32, device=device),
        lora_ranks=torch.full((case.adapters,), case.rank, dtype=torch.int32, device=device),
        scalings=torch.full((case.adapters,), SCALING, device=device),
        num_tokens=tokens,
        phase=Phase.DECODE if case.phase == "decode" else Phase.PREFILL,
        graph_mode=True,
    )
    plan = runner.plan_for(DenseLoraKind.LINEAR, case.rank, problem.x_TI.shape[1], offsets[-1], num_tokens=tokens)
    return runner, plan, offsets


def prepare_triton_v2(problem: Problem) -> Call:
    """The two kernels one after the other."""
    runner, plan, offsets = triton_v2_runner(problem)

    def call(n: int) -> None:
        bridge = runner.run_a(problem.x_TI, problem.a_NSRI[n], stack=len(offsets) - 1, plan=plan)
        runner.run_b(bridge, problem.b_NSOr[n], problem.y_TO, offsets=offsets, plan=plan)

    return call


def prepare_triton_v2_with_base(problem: Problem) -> Call:
    """As its runner does it: the plan says what runs beside the base layer's product."""
    (runner, plan, offsets), product = triton_v2_runner(problem), base_product(problem)

    def call(n: int) -> None:
        a, b = problem.a_NSRI[n], problem.b_NSOr[n]
        runner.apply(problem.x_TI, partial(product, n), plan, a=a, b=b, offsets=offsets)

    return call


def _after_base(prepare: Contender, problem: Problem) -> Call:
    add, product = prepare(problem), base_product(problem)

    def call(n: int) -> None:
        product(n)
        add(n)

    return call


CONTENDERS: Mapping[str, Contender] = {"csgmv": prepare_csgmv, "triton": prepare_triton, "triton_v2": prepare_triton_v2}
WITH_BASE: Mapping[str, Contender] = {
    "csgmv": partial(_after_base, prepare_csgmv),
    "triton": partial(_after_base, prepare_triton),
    "triton_v2": prepare_triton_v2_with_base,
}
