"""Who is measured: systems of ours that are started here, and servers that run already (`vllm` has vLLM's)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from bdlora_perf.report.schema import Value
from bdlora_perf.serve.adapters import adapter_flags
from bdlora_perf.serve.load import Api, Target
from bdlora_perf.serve.options import Benchmark
from bdlora_perf.serve.servers import (
    RunningServer,
    Server,
    adapter_names,
    find_target,
    make_folder,
    memory_metrics,
    send,
    start_server,
    what_runs,
)
from bdlora_perf.serve.systems import ServedSystem
from bdlora_perf.serve.workload import Workload


@dataclass(frozen=True)
class Ready:
    """A server that answers, how it is asked, what runs on it, and what it holds."""

    server: Server
    target: Target
    adapters: Sequence[str]
    runs: Mapping[str, Value]
    memory: Mapping[str, float]


class Contender(Protocol):
    """How a system's server comes about, for a workload's adapters, slots and rank, and what it is when it answers."""

    def start(self, workload: Workload) -> Server: ...
    def inspect(self, server: Server, workload: Workload, api: Api | None) -> Ready: ...


@dataclass(frozen=True)
class Ours:
    """A system that ``bdlora launch`` serves."""

    state: Benchmark
    system: ServedSystem

    def start(self, workload: Workload) -> Server:
        options, made = self.state.options, self.state.adapter(self.system, workload.rank)
        flags = [*options.common_flags, *self.system.flags]
        if made is not None:
            flags += adapter_flags(made, workload.adapters, workload.slots)
        name = workload.server_name(self.system.name)
        return start_server(name, [*flags, *options.server_flags], make_folder(options.work / "logs"))

    def inspect(self, server: Server, workload: Workload, api: Api | None) -> Ready:
        info, log = send("GET", f"{server.url}/server_info").json(), "\n".join(server.log_lines())
        target, names = find_target(server, api), adapter_names(server)
        return Ready(server, target, names, what_runs(info, log), memory_metrics(info, log))


@dataclass(frozen=True)
class Given:
    """A running server; what is set there is not known. ``adapters`` are asked for in place of those that it lists."""

    server: RunningServer
    adapters: Sequence[str]

    def start(self, workload: Workload) -> Server:
        return self.server

    def inspect(self, server: Server, workload: Workload, api: Api | None) -> Ready:
        target, names = find_target(server, api), list(self.adapters) or adapter_names(server)
        return Ready(server, target, names, {"url": server.url, "model": target.model, "adapters": len(names)}, {})
