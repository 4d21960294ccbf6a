"""What is measured, fixed at the start in ``plan.json``: a run folder goes on with the same plan, or not at all."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.utils.sha import sha_fileobj
from pydantic import BaseModel, ConfigDict, ValidationError

from bdlora_perf.quality.init import INITS, Init
from bdlora_perf.quality.systems import METHODS, TARGETS, Method
from bdlora_perf.report.schema import write_atomically
from bdlora_sglang.convert.options import DTYPES
from bdlora_sglang.errors import BDLoRAError

PLAN_FILE = "plan.json"
_POSITIVE = ("ranks", "blocks", "multiples", "learning_rates", "heal_learning_rates")
# Of a field, or of what pydantic calls the problem.
_EXPECTED = {
    "methods": ", ".join(METHODS),
    "inits": ", ".join(INITS),
    "int_parsing": "whole numbers",
    "float_parsing": "numbers",
}


class Plan(BaseModel):
    """Everything that decides the figures. Files are known by their SHA-256: folders may differ between machines.

    ``scaling`` is ``lora_alpha / r`` of every adapter, ``heal_steps`` the further fine-tune of a conversion.
    ``dtype`` is the frozen base model's; adapters are float32.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    model: str
    tasks: dict[str, str]
    methods: tuple[Method, ...] = METHODS
    ranks: tuple[int, ...] = (4, 8, 16)
    blocks: tuple[int, ...] = (8,)
    multiples: tuple[int, ...] = (2, 4)
    inits: tuple[Init, ...] = ("per-block",)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    heal_learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    target_modules: str
    scaling: float
    steps: int
    heal_steps: int
    batch_size: int
    sequence_length: int
    validation_examples: int
    test_examples: int
    calibration_tokens: int
    dtype: str

    def save(self, folder: Path) -> None:
        write_atomically(folder / PLAN_FILE, self.model_dump_json(indent=1) + "\n")


@dataclass(frozen=True)
class QualityOptions:
    """The plan, and what may differ from machine to machine: paths, the device, and which part of the runs is done.

    Attributes:
        part: ``(k, n)``: the k-th of n parts, from 1; parts may run at the same time in one folder.
        speed: a report of ``perf serve`` to take throughput from; None estimates it.
        gpu, tp: of the estimate.
    """

    plan: Plan
    model: Path
    data: Mapping[str, Path]
    output: Path
    device: str
    command: str
    part: tuple[int, int] = (1, 1)
    speed: Path | None = None
    gpu: str = "a100"
    tp: int = 8


def make_plan(model: Path, data: Sequence[Path], fields: Mapping[str, Any]) -> Plan:
    """The plan of these files; ``fields`` are the others of `Plan`, whose numbers may be texts.

    Raises:
        BDLoRAError: a file is missing, two tasks have one name, or a field means nothing.
    """
    names = [path.stem for path in data]
    if len(set(names)) < len(names) or not names:
        raise BDLoRAError(f"--data: found {', '.join(names) or 'none'}, expected files of different names")
    try:
        tasks = {path.stem: _digest(path) for path in data}
    except OSError as error:
        raise BDLoRAError(
            f"--data {error.filename}: found {error.strerror}, expected a .jsonl or a text file"
        ) from error
    try:
        plan = Plan.model_validate({**fields, "model": _fingerprint(model), "tasks": tasks})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name, kind = str(problem["loc"][0]), problem["type"]
        found = ",".join(fields[name]) if kind in _EXPECTED else problem["input"]
        expected = _EXPECTED.get(kind) or _EXPECTED.get(name, problem["msg"])
        raise BDLoRAError(f"{_flag(name)}: found {found!r}, expected {expected}") from error
    _check(plan)
    return plan


def _flag(name: str) -> str:
    return "--init" if name == "inits" else f"--{name.replace('_', '-')}"


def _check(plan: Plan) -> None:
    for name in (*_POSITIVE, "seeds", "inits", "methods"):
        values = getattr(plan, name)
        if not values or len(set(values)) < len(values):
            raise BDLoRAError(f"{_flag(name)}: found {values}, expected different values, one at least")
        if name in _POSITIVE and any(value <= 0 for value in values):
            raise BDLoRAError(f"{_flag(name)}: found {values}, expected positive numbers")
    if "lora" not in plan.methods:
        raise BDLoRAError(f"--methods: found {', '.join(plan.methods)}, expected lora: it is what others are beside")
    if plan.target_modules not in TARGETS:
        raise BDLoRAError(f"--target-modules: found {plan.target_modules!r}, expected {' or '.join(TARGETS)}")
    if plan.dtype not in DTYPES:
        raise BDLoRAError(f"--dtype: found {plan.dtype!r}, expected one of {', '.join(DTYPES)}")
    if min(plan.blocks) < 2:
        raise BDLoRAError(f"--blocks: found {min(plan.blocks)}, expected at least 2 (one block is a plain LoRA)")


def _fingerprint(model: Path) -> str:
    """SHA-256 of the config's and the weights' own."""
    files = [model / "config.json", *sorted(model.glob("*.safetensors"))]
    if not files[0].is_file() or len(files) == 1:
        raise BDLoRAError(f"--model {model}: found no config.json with *.safetensors, expected a model's folder")
    return hashlib.sha256("".join(map(_digest, files)).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return sha_fileobj(file).hex()


def check_plan(plan: Plan, folder: Path, resume: bool) -> None:
    """Find that ``folder`` has no runs yet, or with ``resume`` that they are of the same plan.

    Raises:
        BDLoRAError: there is a plan and no ``resume``, none and ``resume``, a broken one, or another one.
    """
    path = folder / PLAN_FILE
    if not resume:
        if path.exists() or (folder / "runs").exists():
            raise BDLoRAError(f"--output {folder}: found runs there, expected another folder, or --resume")
        return
    try:
        known = Plan.model_validate_json(path.read_text(encoding="utf-8")).model_dump(mode="json")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise BDLoRAError(f"--resume {path}: found {reason}, expected the plan of a run folder") from error
    for name, value in plan.model_dump(mode="json").items():
        if value != known[name]:
            raise BDLoRAError(f"--resume {path}: {name}: found {known[name]}, expected this command's {value}")
