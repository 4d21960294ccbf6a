"""Times of a decode step, a prefill step and whole requests: a roofline for every kernel, alpha-beta for collectives.

Kernels run one after the other, as do collectives: nothing overlaps but the host, which prepares the next step. A
kernel takes the longer of its memory traffic and its arithmetic, and `KERNEL_START` besides.
"""

from dataclasses import astuple, dataclass, replace

from bdlora_perf.estimate.base_cost import (
    KERNELS_PER_LAYER,
    KERNELS_PER_STEP,
    Batch,
    Work,
    attention_work,
    base_collectives,
    decode_batch,
    dense_work,
    head_work,
    prefill_batch,
)
from bdlora_perf.estimate.collectives import collective_seconds
from bdlora_perf.estimate.hardware import GPU, KERNEL_START, MACHINE_GPUS
from bdlora_perf.estimate.lora_cost import IDEAL, VLLM_EXTRA_KERNELS, Assumptions, Serving, adapter_bytes, lora_layers
from bdlora_perf.estimate.model_shape import ModelShape
from bdlora_perf.estimate.traffic import Traffic
from bdlora_sglang.errors import BDLoRAError


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

    ``prefill`` is one step of it. Latencies in seconds, throughput in output tokens a second.
    """

    prefill: Step
    decode: Step
    ttft: float
    tpot: float
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
            "adapters": traffic.adapters * adapter_bytes(self.shape, serving, self.tp),
            "kv_cache": positions * self.shape.kv_bytes_per_token(self.tp),
        }

    def fits(self, serving: Serving, traffic: Traffic) -> bool:
        return sum(self.memory_bytes(serving, traffic).values()) <= self.gpu.memory_bytes

    def requests(self, serving: Serving, traffic: Traffic) -> Requests:
        """Prefill and decode of ``traffic``; raises `BDLoRAError` for blocks that do not match the ranks."""
        serving.check_tp(self.tp)
        prompts = min(traffic.concurrency, max(1, self._prefill_chunk // traffic.input_len))
        prefill = self.step(serving, prefill_batch(traffic, prompts), traffic.distinct(prompts))
        decode = self.step(serving, decode_batch(traffic), traffic.distinct(traffic.concurrency))
        ttft = prefill.seconds * traffic.concurrency / prompts
        latency = ttft + decode.seconds * (traffic.output_len - 1)
        throughput = traffic.concurrency * traffic.output_len / latency
        return Requests(prefill, decode, ttft, decode.seconds, latency, throughput)

    @property
    def _prefill_chunk(self) -> int:
        """SGLang 0.5.23's chunked prefill size by GPU memory (arg_groups/memory_hook.py)."""
        gib = self.gpu.memory_bytes / 2**30
        return 4096 if gib < 60 else 8192 if gib < 160 else 16384

    def step(self, serving: Serving, batch: Batch, distinct: float) -> Step:
        """One forward pass; ``distinct`` adapters are in the batch."""
        shape, tp = self.shape, self.tp
        known = self.assumptions
        decodes = batch.tokens == batch.sequences
        read = batch.tokens if decodes and known.read_for_every_token else distinct
        lora = list(lora_layers(shape, serving, tp, batch.tokens, read))
        exchanges = [layer.exchange for layer in lora if layer.exchange is not None]
        lora_kernels = sum(len(layer.kernels) + layer.extra_kernels for layer in lora)
        lora_kernels += VLLM_EXTRA_KERNELS if lora and known.launches else 0
        start = KERNEL_START.value * 1e-6
        step = Step(
            weights=shape.layers * self._seconds(*dense_work(shape, tp, batch))
            + self._seconds(head_work(shape, tp, batch)),
            attention=shape.layers * self._seconds(attention_work(shape, tp, batch)),
            collectives=sum(
                n * collective_seconds(c, self.gpu.link, tp) for c, n in base_collectives(shape, batch).items()
            ),
            launches=(shape.layers * KERNELS_PER_LAYER + KERNELS_PER_STEP) * start,
            lora=shape.layers * self._seconds(*(kernel for layer in lora for kernel in layer.kernels)),
            lora_collectives=shape.layers
            * sum(collective_seconds(c, self.gpu.link, tp, known.latency) for c in exchanges),
            lora_launches=shape.layers * lora_kernels * start,
        )
        return replace(step, waiting=max(0.0, known.host - step.seconds))

    def _seconds(self, *kernels: Work) -> float:
        return sum(
            max(kernel.num_bytes / self.gpu.bytes_per_second, kernel.flops / self.gpu.flops_per_second)
            for kernel in kernels
        )
