"""Time and peak memory of ``bdlora convert`` on adapters of real sizes, random weights, as a report.

Run ``python -m bdlora_perf.synthetic.convert_benchmark --out perf/results/convert``. Every conversion runs in a process
of its own, whose peak resident memory is the kernel's own count (VmHWM); "above the interpreter" is by how much it
exceeds the same process after its imports. The reference is the plain way for one module: form the dense delta, take
the SVD of each block.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from bdlora_perf.estimate.model_shape import SHAPES, Linear, ModelShape
from bdlora_perf.report.run import Run
from bdlora_perf.report.schema import Metric, Point, Report, Sample, System, Value
from bdlora_perf.synthetic.adapters import ALL_MODULES, MLP_MODULES, lora_config, settle_config
from bdlora_sglang.adapter.checkpoint import WEIGHTS_NAME
from bdlora_sglang.convert import ConvertOptions, RankChoice, lora2bd
from bdlora_sglang.convert.blocks import Block, regroup
from bdlora_sglang.convert.truncate import truncate_blocks

RANK, NBLOCKS = 64, 8
# By billions of parameters.
MODELS: Mapping[int, ModelShape] = {8: SHAPES["llama-3.1-8b"], 70: SHAPES["llama-3.1-70b"]}
RUNS: Mapping[str, RankChoice] = {
    "lossless": RankChoice(),
    "param_ratio 0.87": RankChoice(param_ratio=0.87),
    "max_error 0.5 in param_ratio 0.87": RankChoice(max_error=0.5, param_ratio=0.87),
}
DENSE, THIN = "dense SVD of each block", "thin factors"
METRICS: dict[str, Metric] = {
    "seconds": Metric(label="Time", unit="s", better="lower"),
    "cpu_seconds": Metric(label="CPU time", unit="s", better="lower"),
    "gb_per_s": Metric(label="Weights converted", unit="GB/s", better="higher"),
    "peak_mib": Metric(label="Peak memory", unit="MiB", better="lower"),
    "above_mib": Metric(label="Peak memory above the interpreter", unit="MiB", better="lower"),
    "largest_modules": Metric(label="The same over the largest module's factors", unit="", better="lower"),
    "param_ratio": Metric(label="Parameters over the source's", unit="", better="lower"),
    "error": Metric(label="Relative error of the delta", unit="", better="lower"),
}


def random_factors(linear: Linear, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B, whose ranks matter less and less, as in a trained adapter."""
    a = torch.randn(RANK, linear.inputs, generator=generator) / linear.inputs**0.5
    return a, torch.randn(linear.outputs, RANK, generator=generator) * torch.logspace(0, -1, RANK)


def make_adapter(folder: Path, shape: ModelShape) -> Path:
    """Write a random bfloat16 adapter on all linear modules, and return its folder."""
    lora_config(RANK, None, ALL_MODULES, lora_alpha=2 * RANK).save_pretrained(str(folder))
    settle_config(folder / "adapter_config.json", shape.name)
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, torch.Tensor] = {}
    for layer in range(shape.layers):
        for module, linear in zip(ALL_MODULES, shape.linears(), strict=True):
            block = "mlp" if module in MLP_MODULES else "self_attn"
            for factor, weight in zip("AB", random_factors(linear, generator), strict=True):
                name = f"base_model.model.model.layers.{layer}.{block}.{module}.lora_{factor}.weight"
                weights[name] = weight.to(torch.bfloat16)
    save_file(weights, folder / WEIGHTS_NAME)
    return folder


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def convert(source: Path, destination: Path, options: ConvertOptions) -> dict[str, float]:
    """The figures of one conversion, in a process that has only imported this module."""
    before, cpu, start = _peak_mib(), time.process_time(), time.perf_counter()
    report = lora2bd(source, destination, options, lossless=options.choice.exact)
    seconds, cpu_seconds, peak = time.perf_counter() - start, time.process_time() - cpu, _peak_mib()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "gb_per_s": (source / WEIGHTS_NAME).stat().st_size / seconds / 1e9,
        "peak_mib": peak,
        "above_mib": peak - before,
        "param_ratio": report.param_ratio,
        "error": report.error,
    }


def truncate(linear: Linear) -> dict[str, dict[str, float]]:
    """The figures of one module's truncation by dense SVDs and by ours, in one thread from here on."""
    torch.set_num_threads(1)
    a, b = random_factors(linear, torch.Generator().manual_seed(1))
    rank, side = 2 * RANK // NBLOCKS, linear.side.block_side
    start = time.perf_counter()
    values = torch.stack([torch.linalg.svd(block, full_matrices=False).S for block in (b @ a).chunk(NBLOCKS)])
    dense = {"seconds": time.perf_counter() - start, "error": float(values[:, rank:].norm() / values.norm())}
    start = time.perf_counter()
    _, errors = truncate_blocks(regroup([Block(b, a)], side, NBLOCKS), side, rank)
    thin = {"seconds": time.perf_counter() - start, "error": (errors.error_sq / errors.norm_sq) ** 0.5}
    return {DENSE: dense, THIN: thin}


def benchmark(
    run: Run, models: Mapping[int, ModelShape], rounds: int, options: ConvertOptions, work: Path | None, note: str
) -> Report:
    """Convert an adapter of each model, by its billions of parameters, and truncate q of the first model alone.

    ``work`` is the folder that adapters are made in, None the temporary one; ``note`` a sentence about the machine.
    """
    first, *_ = models.values()
    for round_ in range(rounds):
        for system, figures in truncate(next(first.linears())).items():
            point: Point = {"module": f"q of {first.name}, one thread"}
            run.add(Sample(system=system, point=point, round=round_, metrics=figures))
    sizes: dict[str, Value] = {}
    for billions, shape in models.items():
        modules = [RANK * (linear.inputs + linear.outputs) * 2 for linear in shape.linears()]
        gigabytes, largest = shape.layers * sum(modules) / 1e9, max(modules) / 2**20
        sizes[f"of {shape.name}"] = f"{gigabytes:.2f} GB, the largest module's factors {largest:.1f} MiB"
        with TemporaryDirectory(dir=work) as folder:
            source = make_adapter(Path(folder) / "lora", shape)
            for round_, (system, choice) in product(range(rounds), RUNS.items()):
                own = replace(options, choice=choice)
                with ProcessPoolExecutor(1, get_context("spawn")) as process:
                    figures = process.submit(convert, source, Path(folder) / "bd", own).result()
                figures["largest_modules"] = figures["above_mib"] / largest
                point = {"billions_of_parameters": billions}
                run.add(Sample(system=system, point=point, round=round_, metrics=figures))
                print(shape.name, system, figures, flush=True)
    return Report(
        kind="convert",
        title="Converting adapters: time and peak memory",
        **run.head(),
        settings={
            "adapters": f"LoRA rank {RANK}, bfloat16, all linear modules, to {options.nblocks} blocks",
            **sizes,
            "threads": options.threads,
            "device": options.device,
        },
        systems={name: System(label=name) for name in (*RUNS, DENSE, THIN)},
        metrics=METRICS,
        baselines=(DENSE,),
        samples=tuple(run.samples),
        notes=(
            "Each conversion runs in a process of its own, whose peak memory is the kernel's own count; above the "
            "interpreter is by how much it exceeds the same process after its imports.",
            "The dense SVDs are the plain way for one module: form its delta, take the SVD of each block.",
            *filter(None, [note]),
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [shape.name for shape in MODELS.values()]
    parser.add_argument("--models", nargs="+", default=names, choices=names)
    parser.add_argument("--rounds", type=int, default=2, help="of each conversion")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("perf-convert"), help="folder for the report")
    parser.add_argument("--workdir", type=Path, help="where the adapters are made; default: the temporary folder")
    parser.add_argument("--note", default="", help="a sentence about the machine for the report")
    arguments = parser.parse_args()

    from bdlora_perf.report.render import write_report  # what it imports is no part of a conversion's memory

    run = Run(shlex.join(["python", "-m", "bdlora_perf.synthetic.convert_benchmark", *sys.argv[1:]]), seed=0)
    models = {billions: shape for billions, shape in MODELS.items() if shape.name in arguments.models}
    options = ConvertOptions(NBLOCKS, threads=arguments.threads, device=arguments.device, force=True)
    write_report(benchmark(run, models, arguments.rounds, options, arguments.workdir, arguments.note), arguments.out)
    print((arguments.out / "report.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
