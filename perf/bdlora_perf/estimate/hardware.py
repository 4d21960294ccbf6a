"""What GPUs and links can do. Every figure carries its source; an assumption says that it is one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from bdlora_sglang.errors import BDLoRAError

CollectiveKind = Literal["all-gather", "all-reduce"]


@dataclass(frozen=True)
class Constant:
    """A figure and where it is from."""

    value: float
    unit: str
    source: str


@dataclass(frozen=True)
class Kernel:
    """One kernel's floating-point operations and bytes of memory traffic."""

    flops: float
    num_bytes: float


@dataclass(frozen=True)
class Link:
    """How the GPUs of one machine are connected.

    ``bandwidth`` is what one GPU can send in a ring; what NCCL reaches of it was measured on NVLink 3.
    ``custom_all_reduce``: engines have a kernel of their own for it.
    """

    name: str
    bandwidth: Constant
    custom_all_reduce: bool = True


@dataclass(frozen=True)
class GPU:
    """One GPU. ``matmul`` is what large bfloat16 matrix products reach, ``peak`` what the data sheet says."""

    label: str
    peak: Constant
    matmul: Constant
    bandwidth: Constant
    memory: Constant
    link: Link

    @property
    def memory_bytes(self) -> float:
        return self.memory.value * 1e9

    def seconds(self, kernel: Kernel) -> float:
        """A kernel takes the longer of its memory traffic and its arithmetic."""
        streaming = kernel.num_bytes / (self.bandwidth.value * 1e9 * MEMORY_EFFICIENCY.value)
        return max(streaming, kernel.flops / (self.matmul.value * 1e12))


@dataclass(frozen=True)
class Collective:
    """One collective among the GPUs of one machine, of so many bytes: what all-reduce reads, all-gather writes."""

    kind: CollectiveKind
    num_bytes: float

    def sent_bytes(self, tp: int) -> float:
        """What one rank sends in a ring."""
        return (2 if self.kind == "all-reduce" else 1) * (tp - 1) * self.num_bytes / tp

    def seconds(self, link: Link, tp: int, latency: float | None = None) -> float:
        """Its time, with everything that the ranks wait for.

        Measured on eight A100 with NCCL; other links move bytes in proportion to their own bandwidth. A small
        all-reduce takes the engine's own kernel.

        Args:
            latency: seconds, in place of the measured one of LoRA's collectives (to ask which it would take).
        """
        if tp == 1:
            return 0.0
        measured, bus = NCCL[self.kind]
        if latency is None:
            small = self.num_bytes <= CUSTOM_ALL_REDUCE_MAX.value * 2**20
            custom = small and self.kind == "all-reduce" and link.custom_all_reduce
            latency = (CUSTOM_ALL_REDUCE if custom else measured).value * 1e-6
        bandwidth = bus.value * 1e9 * link.bandwidth.value / NVLINK3.bandwidth.value
        return latency + self.sent_bytes(tp) / bandwidth


_TOPO = "github.com/NVIDIA/nccl, src/graph/topo.h"
_MAMF = "github.com/stas00/ml-engineering, compute/accelerator, maximum achievable matmul FLOPS"
_MEASURED = "nccl-tests on 8 x A100, NCCL 2.17, under CUDA graphs"

MEMORY_EFFICIENCY = Constant(
    0.78,
    "of the data sheet's bandwidth",
    "hazyresearch.stanford.edu/blog/2025-05-27-no-bubbles: a whole Llama forward in one kernel on an H100; "
    "assumption: the same share on every GPU",
)
KERNEL_START = Constant(
    1.3,
    "us a kernel",
    "hazyresearch.stanford.edu/blog/2025-05-27-no-bubbles: start and end of a kernel in a CUDA graph on an H100; "
    "assumption: the same on every GPU, and prefill runs in CUDA graphs too",
)
HOST = Constant(
    5,
    "ms a step",
    "assumption: as long as a GPU takes for a step of Llama-8B on an H100, where vLLM's authors call the host's work "
    "pronounced (blog.vllm.ai/2025/01/27/v1-alpha-release.html)",
)
# Latency at 1 KiB, and bus bandwidth of large messages.
NCCL: Mapping[CollectiveKind, tuple[Constant, Constant]] = {
    "all-gather": (Constant(12.5, "us", f"{_MEASURED}: 1 KiB"), Constant(254, "GB/s", f"{_MEASURED}: bus bandwidth")),
    "all-reduce": (Constant(17.0, "us", f"{_MEASURED}: 1 KiB"), Constant(231, "GB/s", f"{_MEASURED}: bus bandwidth")),
}
CUSTOM_ALL_REDUCE = Constant(
    10.1, "us", "vLLM's custom all-reduce on 8 x A100, 1 KiB, beside NCCL's 17.0 (SGLang's on 8 x H100: 5.9)"
)
CUSTOM_ALL_REDUCE_MAX = Constant(8, "MiB", "SGLang 0.5.23, custom_all_reduce.py: _MAX_CAR_SIZE")
# Between machines nothing was measured.
MACHINE_GPUS = 8

NVLINK3 = Link("NVLink 3, NVSwitch", Constant(12 * 20.0, "GB/s", f"{_TOPO}: SM80_NVLINK_BW 20.0 x 12 links"))
NVLINK4 = Link("NVLink 4, NVSwitch", Constant(18 * 20.6, "GB/s", f"{_TOPO}: SM90_NVLINK_BW 20.6 x 18 links"))
NVLINK5 = Link("NVLink 5, NVSwitch", Constant(18 * 40.1, "GB/s", f"{_TOPO}: SM100_NVLINK_BW 40.1 x 18 links"))
PCIE4 = Link(
    "PCIe 4.0 x16",
    Constant(24.0, "GB/s", "github.com/NVIDIA/nccl, src/graph/topo.cc: kvDictPciGen, 16 lanes of 16 GT/s"),
    # SGLang 0.5.23 refuses its own kernel for more than two GPUs without NVLink.
    custom_all_reduce=False,
)


def _gpu(label: str, sheet: str, peak: float, matmul: Constant, bandwidth: float, memory: float, link: Link) -> GPU:
    sheet = f"NVIDIA {sheet} data sheet"
    return GPU(
        label,
        Constant(peak, "TFLOP/s", f"{sheet}: bfloat16, dense"),
        matmul,
        Constant(bandwidth, "GB/s", f"{sheet}: memory bandwidth"),
        Constant(memory, "GB", f"{sheet}: memory"),
        link,
    )


_A100_MATMUL = Constant(271.2, "TFLOP/s", f"{_MAMF}: A100 SXM")
_H100_MATMUL = Constant(794.5, "TFLOP/s", f"{_MAMF}: H100 SXM, H200 the same")
_B200_MATMUL = Constant(1745.0, "TFLOP/s", f"{_MAMF}: B200 SXM")
_L40S_MATMUL = Constant(290.0, "TFLOP/s", "assumption: 80% of the peak, as H100 reaches")
GPUS: Mapping[str, GPU] = {
    "a100": _gpu("A100 SXM 80 GB", "A100", 312, _A100_MATMUL, 2039, 80, NVLINK3),
    "a100-40gb": _gpu("A100 SXM 40 GB", "A100", 312, _A100_MATMUL, 1555, 40, NVLINK3),
    "h100": _gpu("H100 SXM", "H100", 989, _H100_MATMUL, 3350, 80, NVLINK4),
    "h200": _gpu("H200 SXM", "H200", 989, _H100_MATMUL, 4800, 141, NVLINK4),
    "b200": _gpu("HGX B200", "HGX B200", 2250, _B200_MATMUL, 8000, 180, NVLINK5),
    "l40s": _gpu("L40S", "L40S", 362, _L40S_MATMUL, 864, 48, PCIE4),
}


def find_gpu(name: str) -> GPU:
    """The GPU of this short name; raises `BDLoRAError` for any other."""
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise BDLoRAError(f"--gpu: found '{name}', expected one of {', '.join(GPUS)}")
    return gpu


def sources(gpu: GPU) -> Iterator[tuple[str, Constant]]:
    """Every constant that an estimate for this GPU uses, with a name for it."""
    for name in ("peak", "matmul", "bandwidth", "memory"):
        yield name, getattr(gpu, name)
    yield "link bandwidth", gpu.link.bandwidth
    yield "memory efficiency", MEMORY_EFFICIENCY
    yield "kernel start", KERNEL_START
    yield "host", HOST
    for kind, (latency, bus) in NCCL.items():
        yield f"{kind}, latency", latency
        yield f"{kind}, bandwidth (in proportion to the link's)", bus
    if gpu.link.custom_all_reduce:
        yield "custom all-reduce, latency", CUSTOM_ALL_REDUCE
        yield "custom all-reduce, largest message", CUSTOM_ALL_REDUCE_MAX
