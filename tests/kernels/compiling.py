"""Compile the Triton kernels for GPUs that are absent, and read the machine code's registers."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bdlora_kernels.configurations import Configuration, Shape, load_configurations
from bdlora_kernels.triton_decode import fused_kernel
from bdlora_kernels.triton_expand import expand_kernel
from bdlora_kernels.triton_shrink import shrink_kernel

_KERNELS = {"shrink": shrink_kernel, "expand": expand_kernel, "fused": fused_kernel}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_FACTORS = {"x_ptr", "y_ptr", "a_ptr", "b_ptr"}


@dataclass(frozen=True)
class Variant:
    """A kernel as it is compiled for one architecture."""

    kernel: str
    capability: int
    dtype: str
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int
    registers: int

    def __str__(self) -> str:
        constants = ",".join(f"{name}={value}" for name, value in self.constants)
        return f"{self.kernel}[sm_{self.capability},{self.dtype},{constants},warps={self.warps},stages={self.stages}]"


def variants_in_use(capability: int, dtype: str) -> list[Variant]:
    """Every kernel that the configurations of an architecture can launch, once."""
    configurations = load_configurations(capability)
    assert configurations.architecture == f"sm_{capability}"
    found = {
        variant: None
        for shape, configuration in configurations.by_shape.items()
        for variant in _variants(capability, dtype, shape, configuration)
    }
    return list(found)


def _variants(capability: int, dtype: str, shape: Shape, configuration: Configuration) -> list[Variant]:
    c = configuration
    tokens, shrink_rank = {"BLOCK_T": shape.block_tokens}, shape.block_rank
    shrink = {"BLOCK_K": c.block_k, **tokens}
    # A slice may have fewer ranks than all slices of a slot together.
    expands = [
        {"BLOCK_O": c.block_o, "SPLITS": c.splits, "BLOCK_R": rank, **tokens}
        for rank in sorted({16, min(shrink_rank, 32)})
    ]
    made: list[tuple[str, dict[str, Any], int, int]] = []
    if c.fused:
        for expand in expands:
            constants = {**shrink, **expand, "EXPAND_BLOCK_R": expand["BLOCK_R"], "SHRINK_BLOCK_R": shrink_rank}
            del constants["BLOCK_R"]
            made.append(("fused", constants, c.shrink_warps, c.shrink_stages))
    else:
        made.append(("shrink", {**shrink, "BLOCK_R": shrink_rank, "PDL": c.pdl}, c.shrink_warps, c.shrink_stages))
        made += [("expand", {**expand, "PDL": c.pdl}, c.expand_warps, 3) for expand in expands]
    return [
        Variant(kernel, capability, dtype, tuple(sorted(constants.items())), warps, stages, c.max_registers)
        for kernel, constants, warps, stages in made
    ]


def spilled_bytes(variant: Variant) -> int:
    """Compile, and return the bytes of stack that each thread uses, which hold what did not fit into registers."""
    kernel = _KERNELS[variant.kernel]
    constants = dict(variant.constants)
    signature = {name: _type(name, variant.dtype, constants) for name in kernel.arg_names}
    # Triton compiles for addresses and sizes that 16 divides, as they are in every served model.
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name.endswith("stride") or name == "outputs"
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "maxnreg": variant.registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", variant.capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(_CUOBJDUMP), "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (stack, local), *others = re.findall(r"STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert not others, usage
    return int(stack) + int(local)


def _type(name: str, dtype: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name in _FACTORS:
        return f"*{dtype}"
    if name == "h_ptr":
        return "*fp32"
    return "*i32" if name.endswith("_ptr") else "i32"
