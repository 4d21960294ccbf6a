"""Times of a decode step, a prefill step and whole requests: a roofline for every kernel, alpha-beta for collectives.

Kernels run one after the other, as do collectives: nothing overlaps but the host, which prepares the next step. A
kernel takes the longer of its memory traffic and its arithmetic, and `KERNEL_START` besides.
"""

from dataclasses import astuple, dataclass, replace

from bdlora_perf.estimate.hardware import GPU, KERNEL_START, MACHINE_GPUS, Collective, Kernel
from bdlora_perf.estimate.lora_cost import IDEAL, Assumptions, Serving, lora_work
from bdlora_perf.estimate.model_shape import BYTES_PER_WEIGHT, ModelShape
from bdlora_perf.estimate.traffic import Batch, Traffic
from bdlora_sglang.errors import BDLoRAError

# Of one decoder layer without LoRA: two norms, qkv, rotary embedding with the write to the KV cache, attention, output,
# gate and up, activation, down; the two all-reduces count as collectives.
KERNELS_PER_LAYER = 9
# Embedding, last norm, output head.
KERNELS_PER_STEP = 3


def base_kernels(shape: ModelShape, tp: int, batch: Batch) -> tuple[list[Kernel], Kernel, Kernel]:
    """Of one decoder layer matrix products with element-wise kernels, and attention; then the output head."""
    dense = []
    for layer in shape.fused_layers(tp):
        weights = sum(m.local_inputs * m.local_outputs for m in layer)
        features = layer[0].local_inputs + sum(m.local_outputs for m in layer)
        dense.append(Kernel(2 * batch.tokens * weights, (weights + batch.tokens * features) * BYTES_PER_WEIGHT))
    # Both norms read and write hidden state and residual; the activation reads two and writes one.
    features = 8 * shape.hidden + 3 * shape.intermediate / tp
    dense.append(Kernel(0.0, batch.tokens * features * BYTES_PER_WEIGHT))
    # Queries in, outputs out, new keys and values in, the KV cache read once.
    query = shape.heads * shape.head_dim / tp
    cache = 2 * shape.local_kv_heads(tp) * shape.head_dim
    moved = batch.cached * cache + batch.tokens * (2 * query + cache)
    attention = Kernel(4 * batch.attended * query, moved * BYTES_PER_WEIGHT)
    # For the last token of each sequence.
    weights = shape.vocabulary * shape.hidden / tp
    return dense, attention, Kernel(2 * batch.sequences * weights, weights * BYTES_PER_WEIGHT)


@dataclass(frozen=True)
class Step:
    """Seconds of one step on one rank, by what they go to.

    ``lora_collectives`` are those that LoRA adds; ``waiting`` is how much longer the host takes than the GPU.
    """

    weights: float
    attention: float
    collectives: float
    launches: float
    lora: float
    lora_collectives: float
    lora_launches: float
    waiting: float = 0.0

    @property
    def seconds(self) -> float:
        return float(sum(astuple(self)))


@dataclass(frozen=True)
class Requests:
    """``concurrency`` requests that start together: one prefill after the other, then decode steps with all of them.

    ``prefill`` is one step of it; ``decode`` takes the time per output token. Latencies in seconds, throughput in
    output tokens a second.
    """

    prefill: Step
    decode: Step
    ttft: float
    e2e_latency: float
    output_throughput: float


@dataclass(frozen=True)
class Deployment:
    """A model on GPUs. Raises `BDLoRAError` where tensor parallelism cannot cut the model evenly."""

    shape: ModelShape
    gpu: GPU
    tp: int
    assumptions: Assumptions = IDEAL

    def __post_init__(self) -> None:
        if self.tp > MACHINE_GPUS:
            raise BDLoRAError(f"--tp: found {self.tp}, expected at most {MACHINE_GPUS}, the GPUs of one machine")
        self.shape.check_tp(self.tp)

    def memory_bytes(self, serving: Serving, traffic: Traffic) -> dict[str, float]:
        """Bytes on one GPU: weights, all adapters, and the KV cache of the requests that are under way."""
        positions = traffic.concurrency * (traffic.input_len + traffic.output_len)
        return {
            "weights": self.shape.weight_bytes(self.tp),
            "adapters": traffic.adapters * serving.adapter_bytes(self.shape, self.tp),
            "kv_cache": positions * self.shape.kv_bytes_per_token(self.tp),
        }

    def fits(self, serving: Serving, traffic: Traffic) -> bool:
        return sum(self.memory_bytes(serving, traffic).values()) <= self.gpu.memory_bytes

    def requests(self, serving: Serving, traffic: Traffic) -> Requests:
        """Prefill and decode of ``traffic``.

        Raises:
            BDLoRAError: blocks neither divide the ranks nor are divided by them.
        """
        if serving.nblocks % self.tp and self.tp % serving.nblocks:
            raise BDLoRAError(f"--blocks: found {serving.nblocks} on TP {self.tp}, expected one to divide the other")
        # SGLang 0.5.23's chunked prefill size by GPU memory (arg_groups/memory_hook.py).
        gib = self.gpu.memory_bytes / 2**30
        chunk = 4096 if gib < 60 else 8192 if gib < 160 else 16384
        prompts = min(traffic.concurrency, max(1, chunk // traffic.input_len))
        prefill = self.step(serving, traffic.prefill(prompts))
        decode = self.step(serving, traffic.decode())
        ttft = prefill.seconds * traffic.concurrency / prompts
        latency = ttft + decode.seconds * (traffic.output_len - 1)
        return Requests(prefill, decode, ttft, latency, traffic.concurrency * traffic.output_len / latency)

    def speed_up(self, serving: Serving, other: Serving, traffic: Traffic) -> float:
        """How many times the output throughput of ``other``."""
        ours, theirs = (self.requests(each, traffic).output_throughput for each in (serving, other))
        return ours / theirs

    def step(self, serving: Serving, batch: Batch) -> Step:
        """One forward pass."""
        shape, tp, gpu, known = self.shape, self.tp, self.gpu, self.assumptions
        decodes = batch.tokens == batch.sequences
        read = batch.tokens if decodes and known.read_for_every_token else batch.distinct
        kernels, added = lora_work(shape, serving, tp, batch.tokens, read)
        # vLLM's all-gather along the last dimension ends in a copy.
        starts = len(kernels) + sum(collective.kind == "all-gather" for collective in added)
        starts += known.extra_kernels if kernels else 0
        dense, attention, head = base_kernels(shape, tp, batch)
        # After the embedding and after each row-parallel layer.
        all_reduce = Collective("all-reduce", batch.tokens * shape.hidden * BYTES_PER_WEIGHT).seconds(gpu.link, tp)
        logits = Collective("all-gather", batch.sequences * shape.vocabulary * BYTES_PER_WEIGHT).seconds(gpu.link, tp)
        start = KERNEL_START.value * 1e-6
        step = Step(
            weights=shape.layers * sum(map(gpu.seconds, dense)) + gpu.seconds(head),
            attention=shape.layers * gpu.seconds(attention),
            collectives=(2 * shape.layers + 1) * all_reduce + logits,
            launches=(shape.layers * KERNELS_PER_LAYER + KERNELS_PER_STEP) * start,
            lora=shape.layers * sum(map(gpu.seconds, kernels)),
            lora_collectives=shape.layers * sum(each.seconds(gpu.link, tp, known.latency) for each in added),
            lora_launches=shape.layers * starts * start,
        )
        return replace(step, waiting=max(0.0, known.host - step.seconds))
