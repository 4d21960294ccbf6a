"""What is launched compiles for every architecture: registers, occupancy, wide loads, and when h is read.

In the types that are served: float32 has no tensor cores at full precision, and is for checks.
"""

import os
import re
from collections.abc import Iterable

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bdlora_kernels.configurations import ARCHITECTURES
from bdlora_kernels.triton_expand import expand_kernel
from bdlora_kernels.triton_shrink import shrink_kernel
from bdlora_perf.kernels.absent_gpu import Launched, absent_gpu
from bdlora_perf.kernels.static import RANKS, sweep
from tests.kernels.compiling import (
    Layer,
    compiled,
    compiled_lookup,
    compiled_with_exchange,
    configuration_of,
    launches,
    layers_in_use,
)

each_architecture = pytest.mark.parametrize("capability", ARCHITECTURES, ids="sm_{}".format)

REGISTERS = 65536
# Programs a multiprocessor at the least, by registers: decode (with all blocks of ranks but the largest), else.
PROGRAMS = {"shrink_kernel": (5, 2), "expand_kernel": (3, 2)}
# Outputs that the expand's programs of a decode have under way there, the same.
OUTPUTS = 640, 384
# Bytes of y that a multiprocessor has under way in a prefill: 3.35 TB/s for 0.65 us, by 132 of them.
Y_BYTES = 16 << 10


def resident(launched: Launched) -> int:
    """Programs for which a multiprocessor has registers, which are given out by 8 a thread."""
    code = launched.code
    return REGISTERS // (-(-code.registers // 8) * 8 * 32 * code.warps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@each_architecture
def test_registers_and_occupancy(capability: int, dtype: torch.dtype) -> None:
    check_registers((layer, launched) for layer in layers_in_use(dtype) for launched in compiled(layer, capability))


@pytest.mark.full
@each_architecture
def test_registers_and_occupancy_of_every_configuration(capability: int) -> None:
    """Of the sweep of ``bdlora perf kernels --static``: both models, both phases, all ranks and batches."""
    known: set[object] = set()
    for case in sweep(("Llama-3.1-70B", "Llama-3.1-8B"), ("decode", "prefill"), RANKS):
        shape, decode = case.shape(), case.phase == "decode"
        layer = Layer(
            case.tokens, case.adapters, shape.inputs, shape.total_outputs, len(shape.outputs), case.rank, decode=decode
        )
        for launch in launches(layer, capability):
            binary = launch.kernel.fn.__name__, tuple(sorted(launch.options.items()))
            if binary not in known:
                known.add(binary)
                with absent_gpu(capability) as found:
                    launch.run()
                check_registers([(layer, found[0])])
    assert len(known) > 20


def check_registers(found: Iterable[tuple[Layer, Launched]]) -> None:
    for layer, launched in found:
        code = launched.code
        assert code.stack == 0, f"{code.name} spills {code.stack} bytes in {layer}"
        column = 0 if layer.decode and layer.slices * layer.rank <= 32 else 1
        assert resident(launched) >= PROGRAMS[code.name][column], f"{code.name}: {code.registers} registers in {layer}"
        if code.name == "expand_kernel":
            outputs, tokens = (launched.arguments[name] for name in ("BLOCK_O", "BLOCK_T"))
            if layer.decode:
                assert resident(launched) * outputs >= OUTPUTS[column], f"{code.registers} registers in {layer}"
            else:
                assert resident(launched) * outputs * tokens * layer.dtype.itemsize >= Y_BYTES, layer


def sharded_layers(tokens: int, decode: bool) -> list[Layer]:
    """qkv and o of 70B, fully sharded over 8 ranks, at rank 16: 2 rows of A for each of q, k, v; all 16 of o's."""
    qkv = Layer(tokens, 8, 8192, 1280, 3, 2, decode=decode, gathered=8, exchanged=True)
    return [qkv, Layer(tokens, 8, 1024, 1024, 1, 16, decode=decode, exchanged=True)]


@pytest.mark.parametrize(
    "capability",
    [
        capability if capability == 90 else pytest.param(capability, marks=pytest.mark.full)
        for capability in ARCHITECTURES
    ],
    ids="sm_{}".format,
)
def test_fully_sharded_layers_have_registers_and_occupancy_as_well(capability: int) -> None:
    for decode, tokens in ((True, 64), (False, 8192)):
        for layer in sharded_layers(tokens, decode):
            for launched in compiled_with_exchange(layer, capability):
                code = launched.code
                assert code.stack == 0, f"{code.name} spills {code.stack} bytes in {layer}"
                assert resident(launched) >= PROGRAMS[code.name][0 if decode else 1], (code.registers, layer)


def test_a_fully_sharded_batch_of_another_size_runs_the_same_binary() -> None:
    binaries = []
    for tokens in (33, 64, 100):
        for layer in sharded_layers(tokens, decode=True):
            assert len(compiled_with_exchange(layer, 90)) == 2
        binaries.append([len(kernel.device_caches[90][0]) for kernel in (shrink_kernel, expand_kernel)])
    assert binaries[0] == binaries[1] == binaries[2]


@each_architecture
def test_an_embedding_is_looked_up_without_spills(capability: int) -> None:
    for decode, tokens in ((True, 64), (False, 8192)):
        code = compiled_lookup(Layer(tokens, 8, 16032, 4096, 1, 64, decode=decode), capability).code
        assert code.stack == 0, f"spills {code.stack} bytes"


@pytest.mark.full
@each_architecture
def test_float32_compiles(capability: int) -> None:
    for layer in layers_in_use(torch.float32):
        assert len(compiled(layer, capability)) == 2


@each_architecture
def test_factors_are_loaded_sixteen_bytes_at_a_time(capability: int) -> None:
    """A in the loop of the shrink, straight to shared memory; B and y in the expand."""
    shrink, expand = compiled(Layer(64, 32, 1024, 8192, 1, 8), capability)
    assert len(re.findall(r"LDGSTS\.E\.(?:\w+\.)*128", shrink.code.sass)) >= 4
    assert len(re.findall(r"LDG\.E\.(?:\w+\.)*128", expand.code.sass)) >= 2


@pytest.mark.parametrize("capability", [known for known in ARCHITECTURES if known >= 90], ids="sm_{}".format)
def test_h_is_read_after_the_shrink(capability: int) -> None:
    """With programmatic dependent launch: of h, which alone is read past the first-level cache ("strong"), nothing is
    loaded before the kernel waits for the one before it."""
    for rank in (4, 8, 16, 32):
        _, expand = compiled(Layer(8192, 8, 1024, 8192, 1, rank, decode=False), capability)
        code = [line for line in expand.code.sass.splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/ ", line)]
        waits = [index for index, line in enumerate(code) if "ACQBULK" in line]
        reads = [index for index, line in enumerate(code) if re.search(r"LDG\.E\.(?:\w+\.)*STRONG", line)]
        assert waits and reads and waits[0] < reads[0], (rank, waits, reads)


@pytest.mark.parametrize(
    "batches",
    [
        [Layer(tokens, 1, 1024, 8192, 1, 8) for tokens in (1, 7, 16)],
        [Layer(tokens, 4, 1024, 8192, 1, 8) for tokens in (33, 64, 100, 255)],
        [Layer(tokens, 8, 1024, 8192, 1, 8, decode=False) for tokens in (4097, 4098, 4112, 5001)],
    ],
    ids=["one-tile", "decode", "prefill"],
)
def test_a_batch_of_another_size_runs_the_same_binary(batches: list[Layer]) -> None:
    """Odd, even and round numbers of tokens, one tile and many: nothing is compiled while requests wait."""
    assert len({configuration_of(layer, 90) for layer in batches}) == 1
    compiled(batches[0], 90)
    before = [len(kernel.device_caches[90][0]) for kernel in (shrink_kernel, expand_kernel)]
    for layer in batches:
        compiled(layer, 90)
    assert [len(kernel.device_caches[90][0]) for kernel in (shrink_kernel, expand_kernel)] == before
