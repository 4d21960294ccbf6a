"""A GPU that is not there: Triton compiles what is launched for it, and the launch is written down instead of run.

Kernels are launched by their own host code, ours and SGLang's, with tensors of PyTorch's "meta" device: whatever that
code decides (grids, constants, warps, what Triton specializes on) is what a GPU of this architecture would get.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import triton  # type: ignore[import-untyped, unused-ignore]
from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped, unused-ignore]
from triton.backends.driver import DriverBase  # type: ignore[import-untyped, unused-ignore]
from triton.runtime.driver import driver  # type: ignore[import-untyped, unused-ignore]

_OTHER_ASSEMBLERS = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class MachineCode:
    """What the assembler made of a kernel.

    ``stack`` are bytes a thread, which hold what did not fit into registers; ``parameters`` are names and Triton's
    types ("*bf16", "i32") of what the kernel is given when it runs, in order. ``stages``: of its pipelined loops,
    unless the kernel says else.
    """

    name: str
    warps: int
    registers: int
    stack: int
    shared: int
    sass: str
    stages: int = 1
    parameters: tuple[tuple[str, str], ...] = ()

    @cached_property
    def has_modern_products(self) -> bool:
        """Products of a whole warp group (Hopper) or of tensor memory (Blackwell), not ``mma.sync``."""
        return any(name in self.sass for name in ("HGMMA", "UTCHMMA", "UTCQMMA"))


@dataclass(frozen=True)
class Launched:
    """One launch: its grid, what was compiled for it, and the arguments by name, constants included."""

    grid: tuple[int, int, int]
    code: MachineCode
    arguments: Mapping[str, Any]


@cache
def _disassemble(binary: bytes) -> tuple[int, int, str]:
    """Registers, bytes of stack, and SASS of a kernel that Triton compiled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        sass = subprocess.run(
            [_CUOBJDUMP, "-res-usage", "-sass", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", sass)
    assert len(found) == 1, found
    registers, stack, local = map(int, found[0])
    return registers, stack + local, sass


@contextmanager
def absent_gpu(capability: int) -> Iterator[list[Launched]]:
    """Within the context, what is launched is compiled for ``capability`` (90 for sm_90) and put into the list.

    By Triton's own assembler: FlashInfer names the machine's in the environment, as soon as it is imported.
    """
    launches: list[Launched] = []
    before = driver._active
    driver.set_active(_AbsentGPU(capability, launches))
    try:
        with patch.dict(os.environ):
            for name in _OTHER_ASSEMBLERS:
                os.environ.pop(name, None)
            yield launches
    finally:
        driver.set_active(before)


class _AbsentGPU(DriverBase):  # type: ignore[misc, unused-ignore]
    """Triton's driver interface, of a GPU of compute capability ``capability``."""

    def __init__(self, capability: int, launches: list[Launched]) -> None:
        super().__init__()
        self._capability, self.launches = capability, launches
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 2**20},
            load_binary=lambda name, binary, shared, device: (binary, binary, 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        names = source.fn.arg_names
        given = tuple((name, source.signature[name]) for name in names if source.signature[name] != "constexpr")

        # What Triton calls in place of the kernel: grid, stream, function, metadata twice, two hooks, the arguments.
        def launch(x: int, y: int, z: int, _stream: int, function: bytes, *rest: Any) -> None:
            registers, stack, sass = _disassemble(function)
            compiled = metadata.shared, sass, metadata.num_stages, given
            code = MachineCode(metadata.name, metadata.num_warps, registers, stack, *compiled)
            # Triton keeps the launcher with the kernel: it may be older than the list of now.
            active = driver.active
            assert isinstance(active, _AbsentGPU), active
            active.launches.append(Launched((x, y, z), code, dict(zip(names, rest[4:], strict=True))))

        return launch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        # Triton keeps compiled kernels by device: a number an architecture.
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError
