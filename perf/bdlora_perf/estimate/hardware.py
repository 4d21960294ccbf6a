"""What GPUs and links can do. Every figure carries its source; an assumption says that it is one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

from bdlora_sglang.errors import BDLoRAError


@dataclass(frozen=True)
class Constant:
    """A figure and where it is from."""

    value: float
    unit: str
    source: str


@dataclass(frozen=True)
class Link:
    """How the GPUs of one machine are connected.

    ``bandwidth`` is what one GPU can send in a ring; what NCCL reaches of it was measured on NVLink 3.
    ``custom_all_reduce``: engines have a kernel of their own for it.
    """

    name: str
    bandwidth: Constant
    custom_all_reduce: bool


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
    def flops_per_second(self) -> float:
        return self.matmul.value * 1e12

    @property
    def bytes_per_second(self) -> float:
        """What kernels that stream memory reach."""
        return self.bandwidth.value * 1e9 * MEMORY_EFFICIENCY.value

    @property
    def memory_bytes(self) -> float:
        return self.memory.value * 1e9


_TOPO = "github.com/NVIDIA/nccl, src/graph/topo.h"
_MAMF = "github.com/stas00/ml-engineering, compute/accelerator, maximum achievable matmul FLOPS"

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
_MEASURED = "nccl-tests on 8 x A100, NCCL 2.17, under CUDA graphs"
# By collective: latency at 1 KiB, and bus bandwidth of large messages.
NCCL: Mapping[str, tuple[Constant, Constant]] = {
    "all-gather": (Constant(12.5, "us", f"{_MEASURED}: 1 KiB"), Constant(254, "GB/s", f"{_MEASURED}: bus bandwidth")),
    "all-reduce": (Constant(17.0, "us", f"{_MEASURED}: 1 KiB"), Constant(231, "GB/s", f"{_MEASURED}: bus bandwidth")),
}
CUSTOM_ALL_REDUCE = Constant(
    10.1, "us", "vLLM's custom all-reduce on 8 x A100, 1 KiB, beside NCCL's 17.0 (SGLang's on 8 x H100: 5.9)"
)
CUSTOM_ALL_REDUCE_MAX = Constant(8, "MiB", "SGLang 0.5.23, custom_all_reduce.py: _MAX_CAR_SIZE")
# Between machines nothing was measured.
MACHINE_GPUS = 8


def _nvlink(name: str, links: int, each: float, macro: str) -> Link:
    return Link(
        name,
        Constant(links * each, "GB/s", f"{_TOPO}: {macro}_NVLINK_BW {each} x {links} links"),
        custom_all_reduce=True,
    )


NVLINK3 = _nvlink("NVLink 3, NVSwitch", 12, 20.0, "SM80")
NVLINK4 = _nvlink("NVLink 4, NVSwitch", 18, 20.6, "SM90")
NVLINK5 = _nvlink("NVLink 5, NVSwitch", 18, 40.1, "SM100")
PCIE4 = Link(
    "PCIe 4.0 x16",
    Constant(24.0, "GB/s", "github.com/NVIDIA/nccl, src/graph/topo.cc: kvDictPciGen, 16 lanes of 16 GT/s"),
    # SGLang 0.5.23 refuses its own kernel for more than two GPUs without NVLink.
    custom_all_reduce=False,
)


def _gpu(
    label: str, sheet: str, peak: float, matmul: tuple[float, str], bandwidth: float, memory: float, link: Link
) -> GPU:
    achieved, source = matmul
    return GPU(
        label,
        Constant(peak, "TFLOP/s", f"{sheet}: bfloat16, dense"),
        Constant(achieved, "TFLOP/s", source),
        Constant(bandwidth, "GB/s", f"{sheet}: memory bandwidth"),
        Constant(memory, "GB", f"{sheet}: memory"),
        link,
    )


_A100_SHEET = "NVIDIA A100 data sheet"
_A100_MATMUL = (271.2, f"{_MAMF}: A100 SXM")
_H100_MATMUL = (794.5, f"{_MAMF}: H100 SXM, H200 the same")
GPUS: Mapping[str, GPU] = {
    "a100": _gpu("A100 SXM 80 GB", _A100_SHEET, 312, _A100_MATMUL, 2039, 80, NVLINK3),
    "a100-40gb": _gpu("A100 SXM 40 GB", _A100_SHEET, 312, _A100_MATMUL, 1555, 40, NVLINK3),
    "h100": _gpu("H100 SXM", "NVIDIA H100 data sheet", 989, _H100_MATMUL, 3350, 80, NVLINK4),
    "h200": _gpu("H200 SXM", "NVIDIA H200 data sheet", 989, _H100_MATMUL, 4800, 141, NVLINK4),
    "b200": _gpu("HGX B200", "NVIDIA HGX B200 data sheet", 2250, (1745.0, f"{_MAMF}: B200 SXM"), 8000, 180, NVLINK5),
    "l40s": _gpu(
        "L40S",
        "NVIDIA L40S data sheet",
        362,
        (290.0, "assumption: 80% of the peak, as H100 reaches"),
        864,
        48,
        PCIE4,
    ),
}


def find_gpu(name: str) -> GPU:
    """The GPU of this short name; raises `BDLoRAError` for any other."""
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise BDLoRAError(f"--gpu: found '{name}', expected one of {', '.join(GPUS)}")
    return gpu


def sources(gpu: GPU) -> Iterator[tuple[str, Constant]]:
    """Every constant that an estimate for this GPU uses, with a name for it."""
    for owner in (gpu, gpu.link):
        for field in fields(owner):
            value = getattr(owner, field.name)
            if isinstance(value, Constant):
                yield f"{'link ' if owner is gpu.link else ''}{field.name.replace('_', ' ')}", value
    yield "memory efficiency", MEMORY_EFFICIENCY
    yield "kernel start", KERNEL_START
    yield "host", HOST
    for kind, (latency, bus) in NCCL.items():
        yield f"{kind}, latency", latency
        yield f"{kind}, bandwidth (in proportion to the link's)", bus
    if gpu.link.custom_all_reduce:
        yield "custom all-reduce, latency", CUSTOM_ALL_REDUCE
        yield "custom all-reduce, largest message", CUSTOM_ALL_REDUCE_MAX
