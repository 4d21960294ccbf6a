"""Machine code of ours and of SGLang's kernels, side by side, for a GPU that is absent."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bdlora_perf.kernels.absent_gpu import Launched, MachineCode, absent_gpu
from bdlora_perf.kernels.shapes import Case
from bdlora_perf.kernels.static import KNOWN, SYSTEMS, describe, meta_problem


def test_programs_of_a_multiprocessor() -> None:
    """90 registers are given out as 96: 5 programs of 128 threads; two waves on 132 multiprocessors."""
    code = MachineCode("expand_kernel", warps=4, registers=90, stack=0, shared=4608, sass="")
    row = describe(Launched((660, 2, 1), code, ()), KNOWN[90])
    assert (row["programs"], row["resident"], row["waves"]) == (1320, 5, 2.0)
    # 40 KiB and the system's 1 KiB: five in 227 KiB.
    row = describe(Launched((1, 1, 1), MachineCode("a", 4, 32, 0, 40 * 1024, ""), ()), KNOWN[90])
    assert row["resident"] == 5


@pytest.mark.parametrize("system", SYSTEMS)
def test_each_system_shrinks_and_expands(system: str) -> None:
    case = Case("Llama-3.1-70B", 8, "o", "decode", 1, 1, "uniform", 8)
    with absent_gpu(90) as launches:
        SYSTEMS[system](meta_problem(case, case.rank), 90)
    kernels = [launched for launched in launches if "route" not in launched.code.name]
    assert len(kernels) == 2 and all(launched.code.registers > 0 and launched.programs > 0 for launched in kernels)
