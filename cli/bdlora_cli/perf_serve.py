"""``bdlora perf serve``: throughput and latency of serving many adapters, system against system."""

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from bdlora_cli.perf_output import SYNTHETIC, check_output, make_synthetic_model, print_report
from bdlora_perf.serve.workload import DISTRIBUTIONS, PRESETS, Distribution, Preset
from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.model_names import resolve_model

if TYPE_CHECKING:
    from bdlora_perf.serve.benchmark import ServeOptions

_HELP = """Measure throughput and latency of serving many LoRA adapters, system against system.

Starts each system, or takes running servers (--url), and drives them with SGLang's own load generator. Options that can
be given several times make a sweep over every combination. Flags after "--" go to each server that is started. Ctrl-C
ends the servers and keeps what is measured.

Presets:

""" + "\n\n".join(f"  {name}: {preset.description}" for name, preset in PRESETS.items())


def serve(
    server_flags: Annotated[
        list[str] | None, typer.Argument(metavar="[-- FLAGS...]", help="Flags of bdlora launch, for every server.")
    ] = None,
    preset: Annotated[str, typer.Option(help="What to start from; every other option overrides it.")] = "default",
    model: Annotated[
        str | None, typer.Option(help=f"Path, repo id or short name; '{SYNTHETIC}': a random Llama made on the fly.")
    ] = None,
    hidden_size: Annotated[int, typer.Option(min=1, help="Of the synthetic model.")] = 512,
    layers: Annotated[int, typer.Option(min=1, help="Of the synthetic model.")] = 4,
    tp: Annotated[int | None, typer.Option(min=1, help="TP degree.")] = None,
    systems: Annotated[list[str] | None, typer.Option(help="Systems to start, comma or repeat; default: all.")] = None,
    url: Annotated[list[str] | None, typer.Option(metavar="NAME=URL", help="A running server; repeatable.")] = None,
    concurrency: Annotated[list[int] | None, typer.Option(min=1, help="Requests in flight; repeatable.")] = None,
    request_rate: Annotated[
        list[float] | None, typer.Option(min=0.001, help="Or requests a second, Poisson arrivals; repeatable.")
    ] = None,
    input_len: Annotated[list[int] | None, typer.Option(min=1, help="Tokens of a prompt; repeatable.")] = None,
    output_len: Annotated[list[int] | None, typer.Option(min=1, help="Tokens of an answer; repeatable.")] = None,
    adapters: Annotated[list[int] | None, typer.Option(min=1, help="Number of adapters; repeatable.")] = None,
    distribution: Annotated[
        list[str] | None, typer.Option(help=f"Which adapter is asked for: {', '.join(DISTRIBUTIONS)}; repeatable.")
    ] = None,
    rank: Annotated[list[int] | None, typer.Option(min=1, help="r, the rank of plain LoRA; repeatable.")] = None,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="Requests of one run.")] = None,
    goodput: Annotated[
        list[str] | None, typer.Option(metavar="NAME:MS", help="Bounds (ttft, tpot, e2el) a good request meets.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Runs of each point on each system.")] = None,
    seed: Annotated[int, typer.Option(help="Of the models, adapters, prompts and arrivals.")] = 0,
    keep_servers: Annotated[
        bool | None,
        typer.Option(
            "--keep-servers/--restart-servers",
            help="All servers up at once, or one at a time. Default: kept on a CPU, restarted on a GPU.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("perf-serve"),
    work: Annotated[Path, typer.Option(help="Folder for models, adapters and logs, used again.")] = Path(".perf"),
    force: Annotated[bool, typer.Option("--force", help="Replace a report in the folder.")] = False,
) -> None:
    chosen = _preset(preset)
    base = chosen.sweep
    sweep = replace(
        base,
        # One kind of load replaces the other.
        concurrency=tuple(concurrency or (() if request_rate else base.concurrency)),
        request_rate=tuple(request_rate or (() if concurrency else base.request_rate)),
        input_len=tuple(input_len or base.input_len),
        output_len=tuple(output_len or base.output_len),
        adapters=tuple(adapters or base.adapters),
        distribution=tuple(map(_distribution, distribution)) if distribution else base.distribution,
        rank=tuple(rank or base.rank),
        num_prompts=num_prompts or base.num_prompts,
    )
    workloads = sweep.workloads()
    urls = dict(_named_url(text) for text in url or ())
    names = [name for text in systems or () for name in text.split(",")]
    if not names and not urls:
        names = list(chosen.systems)
    starts_servers = bool(systems) or not urls
    model = model or (chosen.model if starts_servers else None)
    if model not in (None, SYNTHETIC):
        model = resolve_model(str(model))
    check_output(output, force)

    # Seconds of imports: after what can be checked without.
    import torch

    from bdlora_perf.serve.benchmark import ServeOptions
    from bdlora_perf.serve.systems import choose_systems

    has_gpu = torch.accelerator.is_available()
    started = choose_systems(names, has_gpu) if starts_servers else []
    flags = list(server_flags or ())
    if model == SYNTHETIC:
        model = make_synthetic_model(work, hidden_size, layers, seed)
        if not has_gpu and "--dtype" not in flags:
            # SGLang would serve a float32 model in float16, which CPUs are slow at.
            flags = ["--dtype", "float32", *flags]
    keep_servers = not has_gpu if keep_servers is None else keep_servers
    if keep_servers and not has_gpu and "--mem-fraction-static" not in flags:
        # SGLang takes what the servers beside it have allocated for its own.
        flags = ["--mem-fraction-static", "0.9", *flags]
    options = ServeOptions(
        model=model,
        tp=tp or chosen.tp,
        systems=started,
        urls=urls,
        workloads=workloads,
        rounds=rounds or chosen.rounds,
        goodput=tuple(goodput or chosen.goodput),
        keep_servers=keep_servers,
        server_flags=flags,
        seed=seed,
        work=work,
        command=shlex.join(["bdlora", *sys.argv[1:]]),
    )
    _measure(options, output)


serve.__doc__ = _HELP


def _measure(options: "ServeOptions", output: Path) -> None:
    from bdlora_perf.report.render import write_report
    from bdlora_perf.serve.benchmark import run_benchmark

    console = Console()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        report = run_benchmark(options, _ProgressWatcher(progress, options.num_turns))
    paths = write_report(report, output)
    print_report(console, report, paths)
    if report.notes:
        raise typer.Exit(130)


class _ProgressWatcher:
    """A bar with the time left, a step a run."""

    def __init__(self, progress: Progress, num_turns: int) -> None:
        self._progress = progress
        self._task = progress.add_task("preparing", total=num_turns)

    def doing(self, what: str) -> None:
        self._progress.update(self._task, description=what)

    def turn_is_over(self) -> None:
        self._progress.advance(self._task)


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise BDLoRAError(f"--preset: found {name!r}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def _distribution(name: str) -> Distribution:
    for distribution in DISTRIBUTIONS:
        if distribution == name:
            return distribution
    raise BDLoRAError(f"--distribution: found {name!r}, expected one of {', '.join(DISTRIBUTIONS)}")


def _named_url(text: str) -> tuple[str, str]:
    name, separator, url = text.partition("=")
    if not separator or not url.startswith(("http://", "https://")):
        raise BDLoRAError(f"--url: found {text!r}, expected NAME=http://HOST:PORT")
    return name, url
