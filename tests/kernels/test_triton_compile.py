"""Every kernel that a configuration file can launch compiles for its architecture, without register spills.

In the types that are served: float32 has no tensor cores at full precision, and is for checks.
"""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from bdlora_kernels.configurations import known_architectures

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from tests.kernels.compiling import spilled_bytes, variants_in_use


@pytest.fixture(scope="module")
def compilers() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("capability", known_architectures(), ids="sm_{}".format)
def test_compiles_without_spills(capability: int, dtype: str, compilers: ProcessPoolExecutor) -> None:
    variants = variants_in_use(capability, dtype)
    spills = dict(zip(map(str, variants), compilers.map(spilled_bytes, variants), strict=True))
    assert {name: spilled for name, spilled in spills.items() if spilled} == {}


@pytest.mark.full
@pytest.mark.parametrize("capability", known_architectures(), ids="sm_{}".format)
def test_float32_compiles(capability: int, compilers: ProcessPoolExecutor) -> None:
    variants = variants_in_use(capability, "fp32")
    assert len(list(compilers.map(spilled_bytes, variants))) == len(variants)
