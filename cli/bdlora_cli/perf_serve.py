"""``bdlora perf serve``: throughput and latency of serving many adapters, system against system."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from bdlora_cli.perf_output import (
    SYNTHETIC,
    Dtype,
    Force,
    HiddenSize,
    Layers,
    Output,
    Seed,
    ServerFlags,
    Systems,
    Work,
    check_output,
    finish,
    flags_beside_others,
    model_folder,
    server_dtype,
    split,
    typed_command,
)
from bdlora_perf.serve.trace import read_trace
from bdlora_perf.serve.workload import DISTRIBUTIONS, PRESETS, Distribution, Preset
from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.model_names import resolve_model

if TYPE_CHECKING:
    from bdlora_perf.report.schema import Report
    from bdlora_perf.serve.options import ServeOptions

_HELP = """Measure throughput and latency of serving many LoRA adapters, system against system.

Starts each system, and vLLM (--start vllm), or takes running servers (--url): any with OpenAI's /v1/completions, or
SGLang's own API. All are asked by one client. Options that can be given several times make a sweep over every
combination. Flags after "--" go to each server of ours that is started. Ctrl-C ends the servers and keeps what is
measured; --resume goes on from there. Exit code 1 when the main baseline failed.

Presets:

""" + "\n\n".join(f"  {name}: {preset.description}" for name, preset in PRESETS.items())


def serve(
    server_flags: ServerFlags = None,
    preset: Annotated[str, typer.Option(help="What to start from; every other option overrides it.")] = "default",
    model: Annotated[
        str | None, typer.Option(help=f"Path, repo id or short name; '{SYNTHETIC}': a random Llama made on the fly.")
    ] = None,
    hidden_size: HiddenSize = 512,
    layers: Layers = 4,
    tp: Annotated[int | None, typer.Option(min=1, help="TP degree.")] = None,
    one_rank_of: Annotated[
        int | None,
        typer.Option(min=2, help="Serve what one of so many TP ranks computes, with random weights: needs one GPU."),
    ] = None,
    systems: Systems = None,
    param_ratio: Annotated[
        list[float] | None, typer.Option(help="Also BD-LoRA of at most so many times LoRA's parameters; repeatable.")
    ] = None,
    start: Annotated[
        list[str] | None, typer.Option(metavar="vllm", help="Also vLLM: base model, LoRA, fully sharded LoRA.")
    ] = None,
    vllm_environment: Annotated[Path | None, typer.Option(help="The virtual environment that vLLM is in.")] = None,
    url: Annotated[list[str] | None, typer.Option(metavar="NAME=URL", help="A running server; repeatable.")] = None,
    url_adapter: Annotated[
        list[str] | None,
        typer.Option(help="Ask the servers at --url for this adapter; repeatable. Default: all they list."),
    ] = None,
    concurrency: Annotated[list[int] | None, typer.Option(min=1, help="Requests in flight; repeatable.")] = None,
    request_rate: Annotated[
        list[float] | None, typer.Option(min=0.001, help="Or requests a second, Poisson arrivals; repeatable.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Or replay JSON lines: Mooncake's fields, timestamps where there are any.")
    ] = None,
    trace_speed: Annotated[float, typer.Option(min=0.001, help="2 replays in half the time.")] = 1.0,
    find_rate: Annotated[
        bool, typer.Option("--find-rate", help="Of each point the highest rate within --goodput, by bisection.")
    ] = False,
    input_len: Annotated[list[int] | None, typer.Option(min=1, help="Tokens of a prompt; repeatable.")] = None,
    output_len: Annotated[list[int] | None, typer.Option(min=1, help="Tokens of an answer; repeatable.")] = None,
    adapters: Annotated[list[int] | None, typer.Option(min=1, help="Number of adapters; repeatable.")] = None,
    slots: Annotated[int | None, typer.Option(min=1, help="Adapters on the GPU at a time; default: all.")] = None,
    distribution: Annotated[
        list[str] | None, typer.Option(help=f"Which adapter is asked for: {', '.join(DISTRIBUTIONS)}; repeatable.")
    ] = None,
    alpha: Annotated[float, typer.Option(min=0, help="Of zipf: the i-th adapter has a weight of i ** -alpha.")] = 1.0,
    rank: Annotated[list[int] | None, typer.Option(min=1, help="r, the rank of plain LoRA; repeatable.")] = None,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="Requests of one run.")] = None,
    waves: Annotated[
        int | None, typer.Option(min=1, help="Or so many for each in flight; default: 8, and 100 at least.")
    ] = None,
    goodput: Annotated[
        list[str] | None, typer.Option(metavar="NAME:MS", help="Bounds (ttft, tpot, e2el) a good request meets.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Runs of each point on each system.")] = None,
    rounds_a_start: Annotated[
        int, typer.Option(min=1, help="With one server at a time: rounds before it makes room for the next.")
    ] = 1,
    seed: Seed = 0,
    dtype: Dtype = None,
    kv_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of every server's KV cache.")] = None,
    keep_servers: Annotated[
        bool | None,
        typer.Option(
            "--keep-servers/--restart-servers",
            help="All servers up at once, or one at a time. Default: kept on a CPU, restarted on a GPU.",
        ),
    ] = None,
    output: Output = Path("perf-serve"),
    work: Work = Path(".perf"),
    force: Force = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted sweep in the folder.")] = False,
) -> None:
    chosen = _preset(preset)
    base = chosen.sweep
    other_load = bool(concurrency or request_rate or trace)
    sweep = replace(
        base,
        # One kind of load replaces the other.
        concurrency=tuple(concurrency or (() if other_load else base.concurrency)),
        request_rate=tuple(request_rate or (() if other_load else base.request_rate)),
        trace=read_trace(trace, trace_speed) if trace else (),
        input_len=tuple(input_len or base.input_len),
        output_len=tuple(output_len or base.output_len),
        adapters=tuple(adapters or base.adapters),
        slots=slots or base.slots,
        distribution=tuple(map(_distribution, distribution)) if distribution else base.distribution,
        alpha=alpha,
        rank=tuple(rank or base.rank),
        num_prompts=num_prompts or (None if waves else base.num_prompts),
        waves=waves,
    )
    workloads = sweep.workloads()
    bounds = dict(map(_bound, goodput or chosen.goodput))
    names = split(systems)
    starts_servers = bool(names or start or param_ratio or not url)
    if not names and starts_servers:
        names = list(chosen.systems)
    urls = _named_urls(url or ())
    if urls and len(sweep.rank) > 1:
        raise BDLoRAError(f"--rank: found {sweep.rank} with --url, expected one: a running server keeps its adapters")
    if unknown := set(start or ()) - {"vllm"}:
        raise BDLoRAError(f"--start: found {sorted(unknown)[0]!r}, expected vllm")
    if one_rank_of is not None and (tp not in (None, 1) or not starts_servers):
        raise BDLoRAError(f"--one-rank-of {one_rank_of}: found --tp or --url, expected a model that we start at TP 1")
    model = model or (chosen.model if starts_servers else None)
    # Of one rank's model only the shape is wanted, which is known of many.
    if one_rank_of is None and model not in (None, SYNTHETIC):
        model = resolve_model(model)
    before = _before(output) if resume else None
    check_output(output, force or resume)

    # Seconds of imports: after what can be checked without.
    import torch

    from bdlora_perf.engine.bandwidth import shape_of
    from bdlora_perf.serve.adapters import one_rank_model
    from bdlora_perf.serve.options import ServeOptions
    from bdlora_perf.serve.systems import VLLM_SYSTEMS, check_on_one_rank, choose_systems

    has_gpu = torch.accelerator.is_available()
    started = (
        choose_systems(names, has_gpu, param_ratio or (() if systems else chosen.param_ratio)) if starts_servers else []
    )
    started += VLLM_SYSTEMS if start else ()
    if taken := {system.name for system in started} & set(urls):
        raise BDLoRAError(f"--url: found the name {sorted(taken)[0]!r}, which a system has, expected another")
    if model == SYNTHETIC:
        model = model_folder(model, work, hidden_size, layers, seed)
    whole_model = model
    if one_rank_of is not None:
        check_on_one_rank(started)
        model = str(one_rank_model(work, shape_of(str(model)), one_rank_of))
    keep_servers = not has_gpu if keep_servers is None else keep_servers
    options = ServeOptions(
        model=model,
        tp=1 if one_rank_of else tp or chosen.tp,
        systems=started,
        urls=urls,
        workloads=workloads,
        rounds=rounds or chosen.rounds,
        bounds=bounds,
        keep_servers=keep_servers,
        dtype=server_dtype(dtype, has_gpu),
        server_flags=flags_beside_others(server_flags, has_gpu or not keep_servers),
        seed=seed,
        # vLLM and servers of another checkout run elsewhere.
        work=work.resolve(),
        command=typed_command(),
        kv_tokens=kv_tokens,
        find_rate=find_rate,
        url_adapters=tuple(url_adapter or ()),
        vllm_environment=vllm_environment,
        has_gpu=has_gpu,
        rounds_a_start=rounds_a_start,
        one_rank_of=one_rank_of or 1,
        whole_model=whole_model,
    )
    _measure(options, output, before)


serve.__doc__ = _HELP


def _before(output: Path) -> "Report":
    """The report to go on with: that of the same command."""
    from bdlora_perf.report.schema import load_report

    report = load_report(output)
    here, there = (
        [word for word in words if word != "--resume"] for words in (sys.argv[1:], shlex.split(report.command)[1:])
    )
    if here != there:
        raise BDLoRAError(f"--resume: found another command in {output}, expected the same: {report.command}")
    return report


def _measure(options: "ServeOptions", output: Path, before: "Report | None") -> None:
    from bdlora_perf.report.schema import save_report
    from bdlora_perf.serve.benchmark import run_benchmark
    from bdlora_perf.serve.report import main_baseline_failures

    console = Console()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, refresh_per_second=1) as progress:
        watcher = _ProgressWatcher(progress, options.num_turns)
        report = run_benchmark(options, watcher, before, lambda partial: save_report(partial, output))
    finish(console, report, output, all_must_be_measured=False)
    if failures := main_baseline_failures(report):
        raise BDLoRAError(
            f"{failures[0].system}, the main baseline: found {failures[0].message}, expected it to be measured"
        )


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


def _named_urls(texts: Sequence[str]) -> dict[str, str]:
    urls: dict[str, str] = {}
    for text in texts:
        name, separator, url = text.partition("=")
        if not separator or not url.startswith(("http://", "https://")):
            raise BDLoRAError(f"--url: found {text!r}, expected NAME=http://HOST:PORT")
        if name in urls:
            raise BDLoRAError(f"--url: found the name {name!r} twice, expected a name for each")
        urls[name] = url
    return urls


def _bound(text: str) -> tuple[str, float]:
    name, _, most = text.partition(":")
    try:
        if name not in ("ttft", "tpot", "e2el") or float(most) <= 0:
            raise ValueError
    except ValueError:
        raise BDLoRAError(
            f"--goodput: found {text!r}, expected ttft, tpot or e2el with milliseconds, as ttft:2000"
        ) from None
    return name, float(most)
