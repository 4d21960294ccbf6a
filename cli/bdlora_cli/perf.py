"""``bdlora perf``: throughput, latency and quality, measured, estimated and compared. A module for each command."""

import typer

from bdlora_cli.perf_collectives import collectives
from bdlora_cli.perf_compare import compare
from bdlora_cli.perf_engine import engine
from bdlora_cli.perf_estimate import estimate
from bdlora_cli.perf_kernels import kernels
from bdlora_cli.perf_quality import quality
from bdlora_cli.perf_render import render
from bdlora_cli.perf_serve import serve
from bdlora_cli.perf_swap import swap

app = typer.Typer(
    name="perf", help="Throughput, latency and quality: measured, estimated, compared.", no_args_is_help=True
)
for command in (serve, engine, swap, collectives, kernels, estimate, quality, compare, render):
    app.command()(command)
