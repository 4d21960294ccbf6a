"""vLLM's server, started from an environment of its own, with the same model, adapters, cores and KV cache as ours."""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from bdlora_perf.engine.bandwidth import shape_of
from bdlora_perf.report.schema import Value
from bdlora_perf.serve.adapters import adapter_names_of
from bdlora_perf.serve.contenders import Ready
from bdlora_perf.serve.load import Api
from bdlora_perf.serve.options import Benchmark
from bdlora_perf.serve.servers import Server, adapter_names, find_target, make_folder
from bdlora_perf.serve.systems import ServedSystem
from bdlora_perf.serve.workload import Workload
from bdlora_perf.server_process import ServerProcess, free_port
from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.serving.cpu.cores import RankCores, physical_cores, share_out

# What vLLM's CPU attention takes, and its GPU ones too.
_BLOCK = 32
# What vLLM 0.32.0 takes as --max-lora-rank.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_KV_BLOCKS = re.compile(r"num_gpu_blocks_override=(\d+)")
_VERSION = re.compile(r"version (\d[\w.+]*)")
_EAGER = re.compile(r"enforce_eager=(True|False)")
_BACKEND = re.compile(r"Using (\w+) (?:attention )?backend|attention backend:? (\w+)", re.IGNORECASE)


@dataclass(frozen=True)
class VLLM:
    """A system that vLLM serves, from the virtual environment that the options name.

    Raises:
        BDLoRAError: the options name none, or vLLM is not in it.
    """

    state: Benchmark
    system: ServedSystem

    def __post_init__(self) -> None:
        if self.state.options.vllm_environment is None:
            raise BDLoRAError("--start vllm: found no --vllm-environment, expected the folder of one with vLLM in it")
        if not (self._bin / "vllm").is_file():
            raise BDLoRAError(
                f"--vllm-environment {self._bin.parent}: found no bin/vllm there, expected the folder of one with vLLM"
            )

    @property
    def _bin(self) -> Path:
        return Path(self.state.options.vllm_environment or "") / "bin"

    def start(self, workload: Workload) -> ServerProcess:
        """A server that is under way; every name stands for one adapter."""
        options, made, port = self.state.options, self.state.adapter(self.system, workload.rank), free_port()
        words = [str(self._bin / "vllm"), "serve", str(options.model), "--port", str(port), "--dtype", options.dtype]
        sizes = {
            "--tensor-parallel-size": options.tp,
            # A request's tokens at most, and one.
            "--max-model-len": 1 + max(each.kv_tokens // (each.concurrency or 256) for each in options.workloads),
            "--max-num-seqs": options.max_requests,
            "--block-size": _BLOCK,
            "--num-gpu-blocks-override": math.ceil(options.kv_cache / _BLOCK),
        }
        flags = [*self.system.flags]
        if made is not None:
            allowed = next((allowed for allowed in _RANKS if allowed >= workload.rank), workload.rank)
            held = max(workload.slots, workload.adapters)
            sizes |= {"--max-loras": workload.slots, "--max-cpu-loras": held, "--max-lora-rank": allowed}
            names = adapter_names_of(workload.adapters)
            flags += ["--enable-lora", "--lora-modules", *(f"{name}={made.folder}" for name in names)]
        words += [word for flag, value in sizes.items() for word in (flag, str(value))]
        log = make_folder(options.work / "logs") / f"{workload.server_name(self.system.name)}.log"
        command = [*words, "--no-enable-prefix-caching", *flags]
        return ServerProcess(command, f"http://127.0.0.1:{port}", log, self._environment())

    def _environment(self) -> dict[str, str]:
        options = self.state.options
        environment = {**os.environ, "PATH": f"{self._bin}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        if not options.has_gpu:
            # float32 is twice what the shape counts.
            kv_bytes = 2 * options.kv_cache * shape_of(str(options.model)).kv_bytes_per_token(options.tp)
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, share)) for share in self._cores())
            environment["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, math.ceil(kv_bytes / 2**30)))
        return environment

    def _cores(self) -> list[list[int]]:
        """As `bdlora launch` shares them out."""
        return share_out(physical_cores(os.sched_getaffinity(0)), self.state.options.tp)

    def inspect(self, server: Server, workload: Workload, api: Api | None) -> Ready:
        """By its log."""
        options, log, names = self.state.options, "\n".join(server.log_lines()), adapter_names(server)
        version, blocks, eager, attention = (p.search(log) for p in (_VERSION, _KV_BLOCKS, _EAGER, _BACKEND))
        cores = "; ".join(f"rank {rank}: {RankCores(tuple(own), len(own))}" for rank, own in enumerate(self._cores()))
        runs: dict[str, Value] = {
            "engine": f"vLLM {version[1] if version else ''}".strip(),
            "device": "cuda" if options.has_gpu else "cpu",
            "dtype": options.dtype,
            "attention": (attention[1] or attention[2]) if attention else None,
            "LoRA kernels": "vLLM's" if names else None,
            "graphs": None if eager is None else "none" if eager[1] == "True" else "torch.compile",
            "collectives": "vLLM's" if options.tp > 1 else "none",
            "KV cache (tokens)": int(blocks[1]) * _BLOCK if blocks else None,
            "slots": workload.slots if names else None,
            "cores": None if options.has_gpu else cores,
        }
        return Ready(server, find_target(server, api), names, runs, {})
