"""vLLM's server, started from an environment of its own, with the same model, adapters, cores and KV cache as ours."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bdlora_perf.report.schema import Value
from bdlora_perf.serve.servers import make_folder
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
    """How vLLM is started: ``environment`` is the folder of a virtual environment, ``max_len`` a request's tokens."""

    environment: Path
    model: str
    tp: int
    dtype: str
    kv_tokens: int
    kv_bytes: float
    max_requests: int
    max_len: int
    has_gpu: bool

    def check(self) -> None:
        """Raise `BDLoRAError` where vLLM is not there."""
        if not self._command.is_file():
            raise BDLoRAError(
                f"--vllm-environment {self.environment}: found no bin/vllm there, expected the folder of one with vLLM"
            )

    @property
    def _command(self) -> Path:
        return self.environment / "bin" / "vllm"

    def start(
        self,
        name: str,
        flags: Sequence[str],
        adapter: Path | None,
        rank: int,
        names: Sequence[str],
        slots: int,
        logs: Path,
    ) -> ServerProcess:
        """A server that is under way; every name stands for one ``adapter``."""
        port = free_port()
        words = [str(self._command), "serve", self.model, "--port", str(port), "--dtype", self.dtype]
        sizes = {
            "--tensor-parallel-size": self.tp,
            "--max-model-len": self.max_len,
            "--max-num-seqs": self.max_requests,
            "--block-size": _BLOCK,
            "--num-gpu-blocks-override": math.ceil(self.kv_tokens / _BLOCK),
        }
        if adapter is not None:
            allowed = next((allowed for allowed in _RANKS if allowed >= rank), rank)
            sizes |= {"--max-loras": slots, "--max-cpu-loras": max(slots, len(names)), "--max-lora-rank": allowed}
            flags = [*flags, "--enable-lora", "--lora-modules", *(f"{each}={adapter}" for each in names)]
        words += [word for flag, value in sizes.items() for word in (flag, str(value))]
        words += ["--no-enable-prefix-caching", *flags]
        log = make_folder(logs) / f"{name}.log"
        return ServerProcess(words, f"http://127.0.0.1:{port}", log, self._environment())

    def _environment(self) -> dict[str, str]:
        environment = {**os.environ, "PATH": f"{self.environment / 'bin'}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        if not self.has_gpu:
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, share)) for share in self._cores())
            environment["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, math.ceil(self.kv_bytes / 2**30)))
        return environment

    def _cores(self) -> list[list[int]]:
        """As `bdlora launch` shares them out."""
        return share_out(physical_cores(os.sched_getaffinity(0)), self.tp)

    def what_runs(self, log: str, slots: int | None) -> dict[str, Value]:
        """By its log."""
        version, blocks, eager, attention = (p.search(log) for p in (_VERSION, _KV_BLOCKS, _EAGER, _BACKEND))
        cores = "; ".join(f"rank {rank}: {RankCores(tuple(own), len(own))}" for rank, own in enumerate(self._cores()))
        return {
            "engine": f"vLLM {version[1] if version else ''}".strip(),
            "device": "cuda" if self.has_gpu else "cpu",
            "dtype": self.dtype,
            "attention": (attention[1] or attention[2]) if attention else None,
            "LoRA kernels": None if slots is None else "vLLM's",
            "graphs": None if eager is None else "none" if eager[1] == "True" else "torch.compile",
            "collectives": "vLLM's" if self.tp > 1 else "none",
            "KV cache (tokens)": int(blocks[1]) * _BLOCK if blocks else None,
            "slots": slots,
            "cores": None if self.has_gpu else cores,
        }
