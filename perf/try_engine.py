"""What only a GPU can show of the engine, in a few minutes: run by `perf/try_engine_on_gpu.sh`, elsewhere for practice.

A random model at TP 1 with CUDA graphs, adapters of several kinds, fewer slots than adapters. Every check is made
whatever became of those before it; ``checks.json`` says how each went, and the exit code how many failed.
"""

import argparse
import json
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bdlora_perf.synthetic import make_adapter, make_model
from bdlora_perf.synthetic.reference import PeftReference

SPECS: dict[str, dict[str, Any]] = {
    "plain-r16": {"rank": 16},
    "bd2-r8": {"rank": 8, "nblocks": 2},
    "bd8-r32": {"rank": 32, "nblocks": 8},
    "attention-r5": {"rank": 5, "target_modules": ["q_proj", "v_proj", "o_proj"], "use_rslora": True},
    "large-r64": {"rank": 64},
}
LATE = "large-r64"
SLOTS = 3
SAMPLING = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
# In 16 bits two engines differ by their order of sums; LoRA must not add more than the base model's own difference.
WORST_RATIO = 4.0


class Checks:
    def __init__(self, folder: Path, only: list[str]) -> None:
        self._only, self._file = only, folder / "checks.json"
        self._found: dict[str, dict[str, Any]] = {}

    def run(self, name: str, check: Callable[[], Any]) -> None:
        if self._only and name not in self._only:
            return
        try:
            self._found[name] = {"passed": True, "found": check()}
        except Exception:
            self._found[name] = {"passed": False, "found": traceback.format_exc()}
        print(
            f"{name}: {'passed' if self._found[name]['passed'] else 'FAILED'}: {self._found[name]['found']}", flush=True
        )
        self._file.write_text(json.dumps(self._found, indent=1) + "\n")

    @property
    def failures(self) -> int:
        return sum(not found["passed"] for found in self._found.values())


class Trial:
    def __init__(self, folder: Path, dtype: str) -> None:
        self.dtype, self.model = dtype, make_model(folder / "model", vocab_size=512, hidden_size=192)
        self.adapters = {
            name: make_adapter(folder / name, self.model, seed=seed, **spec)
            for seed, (name, spec) in enumerate(SPECS.items())
        }
        self.reference = PeftReference(self.model, getattr(torch, dtype))

    def start(self, **options: Any) -> Any:
        from bdlora_sglang import Engine

        given = [f"{name}={path}" for name, path in self.adapters.items() if name != LATE]
        return Engine(
            model_path=str(self.model),
            dtype=self.dtype,
            lora_paths=given,
            lora_target_modules=["all"],
            max_lora_rank=64,
            max_loras_per_batch=SLOTS,
            max_total_tokens=32768,
            skip_tokenizer_init=True,
            log_level="info",
            **options,
        )

    def error(self, engine: Any, name: str | None, prompts: list[list[int]]) -> float:
        """RMS difference of log-probabilities from PEFT's, with the tokens that the engine chose."""
        answers = generate(engine, [name] * len(prompts), prompts)
        squares: list[float] = []
        for prompt, answer in zip(prompts, answers, strict=True):
            expected = self.reference.logprobs(prompt, self.adapters.get(name or ""), answer["output_ids"])
            squares += [(a - b) ** 2 for a, b in zip(logprobs(answer), expected, strict=True)]
        return math.sqrt(sum(squares) / len(squares))


def generate(engine: Any, names: list[str | None], prompts: list[list[int]]) -> list[Any]:
    return engine.generate(input_ids=prompts, lora_path=names, sampling_params=SAMPLING, return_logprob=True)


def logprobs(answer: Any) -> list[float]:
    return [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]


def as_peft(trial: Trial, engine: Any, names: list[str | None]) -> dict[str, float]:
    prompts = [[11, 23, 5], list(range(60, 101)), [(7 * i) % 500 for i in range(700)]]
    errors = {str(name): trial.error(engine, name, prompts) for name in [None, *names]}
    worst = max(errors.values())
    assert worst <= WORST_RATIO * max(errors["None"], 1e-4), errors
    return errors


def as_alone(engine: Any, names: list[str | None], exactly: bool) -> float:
    """Mixed batches of many sizes (captured graphs of many sizes), each request against itself alone."""
    prompts = [[5 + i, 90, 17] for i in range(33)]
    alone = {}
    worst = 0.0
    for size in (1, 2, 3, 7, 16, 33):
        own = [names[i % len(names)] for i in range(size)]
        for i, answer in enumerate(generate(engine, own, prompts[:size])):
            key = own[i], i
            if key not in alone:
                alone[key] = logprobs(generate(engine, [own[i]], [prompts[i]])[0])
            # The first token: later ones may differ where two are nearly as likely.
            worst = max(worst, abs(logprobs(answer)[0] - alone[key][0]))
    assert worst <= (0.0 if exactly else 0.1), worst
    return worst


def load_and_unload(trial: Trial, engine: Any) -> dict[str, float]:
    path = trial.adapters[LATE]
    for _ in range(3):
        assert engine.load_lora_adapter(LATE, str(path)).success
        errors = as_peft(trial, engine, [LATE])
        assert engine.unload_lora_adapter(LATE).success
    tensors, config = (
        load_file(path / "adapter_model.safetensors"),
        json.loads((path / "adapter_config.json").read_text()),
    )
    result = engine.load_lora_adapter_from_tensors(LATE, tensors, config)
    assert result.success, result.error_message
    errors |= {"from tensors": as_peft(trial, engine, [LATE])[LATE]}
    assert engine.unload_lora_adapter(LATE).success
    return errors


def swapping(trial: Trial, engine: Any, names: list[str]) -> int:
    """One adapter after the other, with more of them than slots: each comes back to a slot that another had."""
    first = {name: logprobs(generate(engine, [name], [[9, 8, 7]])[0]) for name in names}
    for turn in range(12 * len(names)):
        name = names[(turn * 3) % len(names)] if turn % 2 else names[turn % len(names)]
        again = logprobs(generate(engine, [name], [[9, 8, 7]])[0])
        assert max(abs(a - b) for a, b in zip(again, first[name], strict=True)) < 1e-3, name
    return 12 * len(names)


def memory(engine: Any) -> dict[str, Any]:
    info = engine.get_server_info()
    usage = info["internal_states"][0]["memory_usage"]
    free = torch.cuda.mem_get_info() if torch.cuda.is_available() else None
    return {"kv_tokens": info["max_total_num_tokens"], "usage": usage, "free_and_total": free}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", action="append", default=[], help="a check by its name; repeatable")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    checks, trial = Checks(options.output, options.only), Trial(options.output, options.dtype)
    names = [name for name in SPECS if name != LATE]
    mixed: list[str | None] = [None, *names[:SLOTS]]
    engine = trial.start()
    checks.run("memory after start", lambda: memory(engine))
    checks.run("tokens against PEFT", lambda: as_peft(trial, engine, list(names)))
    checks.run("mixed batches", lambda: as_alone(engine, mixed, exactly=False))
    checks.run("load and unload", lambda: load_and_unload(trial, engine))
    checks.run("swap", lambda: swapping(trial, engine, names))
    checks.run("tokens against PEFT, afterwards", lambda: as_peft(trial, engine, list(names)))
    engine.shutdown()
    if torch.cuda.is_available():
        deterministic = trial.start(enable_deterministic_inference=True)
        checks.run("deterministic inference", lambda: as_alone(deterministic, mixed, exactly=True))
        deterministic.shutdown()
    return checks.failures


if __name__ == "__main__":
    sys.exit(main())
