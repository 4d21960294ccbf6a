"""Memory holds a few modules at a time, however large the adapter is."""

import subprocess
import sys
from pathlib import Path

import pytest

from bdlora_sglang.adapter import Adapter
from tests.convert.oracle import Q, save_lora

MEASURE = """
import sys
from pathlib import Path
from bdlora_sglang.convert import ConvertOptions, RankChoice, lora2bd

def peak():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))

small, large, out = sys.argv[1:4]
options = ConvertOptions(4, RankChoice(rank=32), threads=2) if sys.argv[4] == "cut" else ConvertOptions(4, threads=2)
lora2bd(small, out + "-small", options, lossless=sys.argv[4] == "lossless")  # LAPACK's workspaces, once
before = peak()
lora2bd(large, out + "-large", options, lossless=sys.argv[4] == "lossless")
print(peak() - before)
"""
MIB = 1 << 20


@pytest.mark.parametrize("how", ["lossless", "cut"])
def test_peak_does_not_grow_with_the_number_of_modules(how: str, tmp_path: Path) -> None:
    """48 modules of 2 MiB against 6: what is mapped of the file and the allocator's slack on top, not the file."""
    shapes = {f"model.layers.{i}.{n}": (4096, 4096) for i in range(24) for n in ("q_proj", "o_proj")}
    large = save_lora(tmp_path / "large", shapes, 64)
    small = save_lora(tmp_path / "small", dict(list(shapes.items())[:6]), 64)
    size = (large / "adapter_model.safetensors").stat().st_size
    command = [sys.executable, "-c", MEASURE, str(small), str(large), str(tmp_path / "out"), how]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert size > 95 * MIB
    assert grown < 40 * MIB


def test_a_file_put_in_place_while_reading_is_another_one(tmp_path: Path) -> None:
    """Reading maps the file anew from time to time; it goes on with the one that was checked."""
    ours = save_lora(tmp_path / "ours", {Q: (65536, 128)}, 64)
    theirs = save_lora(tmp_path / "theirs", {Q: (8, 8)}, 2)
    adapter = Adapter.open(ours)
    module = adapter.modules[Q]

    def read() -> float:
        return float(adapter.checkpoint.read(module.tensor_a, range(64), range(65536)).sum())

    first = read()
    (theirs / "adapter_model.safetensors").replace(ours / "adapter_model.safetensors")
    assert [read(), read()] == [first, first]
