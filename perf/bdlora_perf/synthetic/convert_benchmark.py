"""Time and peak memory of ``bdlora convert`` on adapters of real sizes, random weights.

Run ``python -m bdlora_perf.synthetic.convert_benchmark --out perf/results/convert``. Every conversion runs in a process
of its own, whose peak resident memory is the kernel's own count (VmHWM); "above the interpreter" is by how much it
exceeds the same process after its imports. The reference is the plain way for one module: form the dense delta, take
the SVD of each block.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bdlora_sglang.adapter import BlockSide
from bdlora_sglang.convert import ConvertOptions, RankChoice, lora2bd
from bdlora_sglang.convert.blocks import Block, regroup
from bdlora_sglang.convert.sides import SIDES
from bdlora_sglang.convert.truncate import truncate_blocks
from bdlora_sglang.convert.writer import SafetensorsWriter, header_room

RANK, NBLOCKS = 64, 8
# (hidden size, k and v features, intermediate size, layers)
SIZES: Mapping[str, tuple[int, int, int, int]] = {
    "Llama-3.1-8B": (4096, 1024, 14336, 32),
    "Llama-3.1-70B": (8192, 1024, 28672, 80),
}
RUNS: Mapping[str, dict[str, Any]] = {
    "lossless": {"lossless": True},
    "param_ratio 0.87": {"choice": {"param_ratio": 0.87}},
    "max_error 0.5 in param_ratio 0.87": {"choice": {"max_error": 0.5, "param_ratio": 0.87}},
}


def module_shapes(model: str) -> dict[str, tuple[int, int]]:
    """``(in, out)`` of every linear module of one layer."""
    hidden, kv, intermediate, _ = SIZES[model]
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, intermediate),
        "mlp.up_proj": (hidden, intermediate),
        "mlp.down_proj": (intermediate, hidden),
    }


def make_adapter(folder: Path, model: str) -> int:
    """Write a random bfloat16 rank-64 adapter on all linear modules, and return the bytes of its weights."""
    folder.mkdir()
    shapes = module_shapes(model)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "base_model_name_or_path": model}
    config["target_modules"] = sorted(name.split(".")[-1] for name in shapes)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    modules = [f"base_model.model.model.layers.{i}.{name}" for i in range(SIZES[model][3]) for name in shapes]
    names = [f"{module}.lora_{factor}.weight" for module in modules for factor in "AB"]
    generator = torch.Generator().manual_seed(0)
    # Ranks that matter less and less, as in a trained adapter.
    decay = torch.logspace(0, -1, RANK)
    with SafetensorsWriter(folder / "adapter_model.safetensors", torch.bfloat16, header_room(names, {})) as writer:
        for name in names:
            inputs, outputs = shapes[".".join(name.split(".")[5:7])]
            if ".lora_A." in name:
                weight = torch.randn(RANK, inputs, generator=generator) / inputs**0.5
            else:
                weight = torch.randn(outputs, RANK, generator=generator) * decay
            writer.add(name, [weight.to(torch.bfloat16)])
        writer.finish({})
    return (folder / "adapter_model.safetensors").stat().st_size


def run_one(source: Path, destination: Path, run: str, threads: int, device: str) -> dict[str, float]:
    """One conversion in this process: seconds, and peak bytes before and after."""
    arguments = RUNS[run]
    before = _peak_bytes()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu_before = usage.ru_utime + usage.ru_stime
    options = ConvertOptions(
        NBLOCKS, RankChoice(**arguments.get("choice", {})), threads=threads, device=device, force=True
    )
    start = time.perf_counter()
    report = lora2bd(source, destination, options, lossless=arguments.get("lossless", False))
    seconds = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime - cpu_before,
        "interpreter_bytes": before,
        "peak_bytes": _peak_bytes(),
        "param_ratio": report.param_ratio,
        "error": report.error,
    }


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def reference(model: str, module: str) -> dict[str, float]:
    """The same truncation of one module by dense SVDs and by ours, one thread each: seconds and relative error."""
    torch.set_num_threads(1)
    inputs, outputs = module_shapes(model)[module]
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(RANK, inputs, generator=generator) / inputs**0.5
    b = torch.randn(outputs, RANK, generator=generator) * torch.logspace(0, -1, RANK)
    rank = 2 * RANK // NBLOCKS
    start = time.perf_counter()
    delta = b @ a
    values = [torch.linalg.svd(block, full_matrices=False).S for block in delta.chunk(NBLOCKS)]
    dense_seconds = time.perf_counter() - start
    dense_error = (sum(s[rank:].square().sum() for s in values) / sum(s.square().sum() for s in values)) ** 0.5
    start = time.perf_counter()
    _, errors = truncate_blocks(regroup([Block(b, a)], BlockSide.B, NBLOCKS), BlockSide.B, rank)
    thin_seconds = time.perf_counter() - start
    return {
        "dense_seconds": dense_seconds,
        "thin_seconds": thin_seconds,
        "dense_error": float(dense_error),
        "thin_error": (errors.error_sq / errors.norm_sq) ** 0.5,
    }


def largest_module_bytes(model: str) -> int:
    return max(RANK * (inputs + outputs) * 2 for inputs, outputs in module_shapes(model).values())


def benchmark(models: list[str], threads: int, device: str, workdir: Path | None) -> dict[str, Any]:
    results: dict[str, Any] = {
        "machine": f"{os.cpu_count()} {platform.machine()} cores, torch {torch.__version__}, device {device}",
        "threads": threads,
        "adapter": f"LoRA rank {RANK}, bfloat16, all linear modules, to {NBLOCKS} blocks",
        "models": {},
        "reference": {"module": "self_attn.q_proj of Llama-3.1-8B", **reference("Llama-3.1-8B", "self_attn.q_proj")},
    }
    assert all(name.split(".")[-1] in SIDES for model in models for name in module_shapes(model))
    for model in models:
        with tempfile.TemporaryDirectory(dir=workdir) as folder:
            source = Path(folder) / "lora"
            size = make_adapter(source, model)
            runs = {}
            for run in RUNS:
                command = [
                    sys.executable,
                    "-m",
                    "bdlora_perf.synthetic.convert_benchmark",
                    "--one",
                    str(source),
                    f"{folder}/bd",
                ]
                command += ["--run", run, "--threads", str(threads), "--device", device]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                runs[run] = json.loads(output.splitlines()[-1])
                runs[run]["gb_per_second"] = size / runs[run]["seconds"] / 1e9
                print(model, run, runs[run], flush=True)
            results["models"][model] = {
                "bytes": size,
                "largest_module_bytes": largest_module_bytes(model),
                "runs": runs,
            }
    return results


def as_markdown(results: Mapping[str, Any]) -> str:
    """The results as a page."""
    lines = [
        "# Converting adapters: time and peak memory",
        "",
        f"{results['adapter']}. {results['machine']}, {results['threads']} threads. {results['note']}",
        "",
        "| adapter | size | conversion | seconds | CPU seconds | GB/s | peak memory | above the interpreter "
        "| times the largest module |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model, result in results["models"].items():
        for run, numbers in result["runs"].items():
            above = numbers["peak_bytes"] - numbers["interpreter_bytes"]
            lines.append(
                f"| {model} r={RANK} | {result['bytes'] / 1e9:.2f} GB | {run} | {numbers['seconds']:.1f} | "
                f"{numbers['cpu_seconds']:.1f} | "
                f"{numbers['gb_per_second']:.3f} | {numbers['peak_bytes'] / 2**20:.0f} MiB | {above / 2**20:.0f} MiB | "
                f"{above / result['largest_module_bytes']:.0f} |"
            )
    ref = results["reference"]
    largest = ", ".join(f"{m} {r['largest_module_bytes'] / 2**20:.1f} MiB" for m, r in results["models"].items())
    times = ref["dense_seconds"] / ref["thin_seconds"]
    lines += ["", f"Bytes of the largest module's factors as stored: {largest}.", ""]
    lines.append(
        f"Reference, {ref['module']}, one thread: dense SVD of each block {ref['dense_seconds']:.2f} s, thin factors "
        f"{ref['thin_seconds']:.3f} s ({times:.0f} times faster); relative error {ref['dense_error']:.6f} and "
        f"{ref['thin_error']:.6f}."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder for results.json and results.md")
    parser.add_argument("--workdir", type=Path, help="where the adapters are made; default: the temporary folder")
    parser.add_argument("--one", nargs=2, type=Path, metavar=("SRC", "DST"), help=argparse.SUPPRESS)
    parser.add_argument("--run", choices=list(RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--note", default="", help="a sentence about the machine for the results")
    arguments = parser.parse_args()
    if arguments.one:
        print(
            json.dumps(run_one(arguments.one[0], arguments.one[1], arguments.run, arguments.threads, arguments.device))
        )
        return
    results = benchmark(arguments.models, arguments.threads, arguments.device, arguments.workdir)
    results["note"] = arguments.note
    print(as_markdown(results))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (arguments.out / "results.md").write_text(as_markdown(results))


if __name__ == "__main__":
    main()
