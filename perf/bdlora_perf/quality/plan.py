"""What is measured, fixed at the start in ``plan.json``: a run folder goes on with the same plan, or not at all."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from bdlora_perf.quality.data import digest, task_name
from bdlora_perf.quality.init import INITS, Init
from bdlora_perf.quality.systems import CONVERSIONS, METHODS, TARGETS, Method
from bdlora_perf.report.schema import write_atomically
from bdlora_sglang.convert.options import DTYPES
from bdlora_sglang.errors import BDLoRAError

PLAN_FILE = "plan.json"


class Plan(BaseModel):
    """Everything that decides the figures. Files are known by their SHA-256: folders may differ between machines.

    ``scaling`` is ``lora_alpha / r`` of every adapter, ``heal_steps`` the further fine-tune of a conversion.
    ``dtype`` is the frozen base model's; adapters are float32.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    model: str
    tasks: dict[str, str]
    methods: tuple[Method, ...]
    ranks: tuple[int, ...]
    blocks: tuple[int, ...]
    multiples: tuple[int, ...]
    inits: tuple[Init, ...]
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    heal_learning_rates: tuple[float, ...]
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


def make_plan(model: Path, data: Sequence[Path], **fields: Any) -> Plan:
    """The plan of these files; ``fields`` are the others of `Plan`.

    Raises:
        BDLoRAError: a file is missing, two tasks have one name, or a field means nothing.
    """
    names = [task_name(path) for path in data]
    if len(set(names)) < len(names) or not names:
        raise BDLoRAError(f"--data: found {', '.join(names) or 'none'}, expected files of different names")
    tasks = {name: digest(path) for name, path in zip(names, data, strict=True)}
    try:
        plan = Plan(model=_fingerprint(model), tasks=tasks, **fields)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = str(problem["loc"][0])
        expected = {"methods": METHODS, "inits": INITS}.get(name)
        raise BDLoRAError(
            f"{_flag(name)}: found {problem['input']!r}, expected {', '.join(expected) if expected else problem['msg']}"
        ) from error
    _check(plan)
    return plan


def _flag(name: str) -> str:
    return "--init" if name == "inits" else f"--{name.replace('_', '-')}"


def _check(plan: Plan) -> None:
    for name in ("ranks", "blocks", "multiples", "seeds", "learning_rates", "heal_learning_rates", "inits", "methods"):
        values = getattr(plan, name)
        if not values or len(set(values)) < len(values):
            raise BDLoRAError(f"{_flag(name)}: found {values}, expected different values, one at least")
        if any(isinstance(value, (int, float)) and value <= 0 for value in values) and name != "seeds":
            raise BDLoRAError(f"{_flag(name)}: found {values}, expected positive numbers")
    if "lora" not in plan.methods:
        raise BDLoRAError(f"--methods: found {', '.join(plan.methods)}, expected lora: it is what others are beside")
    if plan.target_modules not in TARGETS:
        raise BDLoRAError(f"--target-modules: found {plan.target_modules!r}, expected {' or '.join(TARGETS)}")
    if plan.dtype not in DTYPES:
        raise BDLoRAError(f"--dtype: found {plan.dtype!r}, expected one of {', '.join(DTYPES)}")
    if set(plan.methods) & {"bd", *CONVERSIONS} and min(plan.blocks) < 2:
        raise BDLoRAError(f"--blocks: found {min(plan.blocks)}, expected at least 2 (one block is a plain LoRA)")


def _fingerprint(model: Path) -> str:
    """SHA-256 of the config's and the weights' own."""
    files = [model / "config.json", *sorted(model.glob("*.safetensors"))]
    if not files[0].is_file() or len(files) == 1:
        raise BDLoRAError(f"--model {model}: found no config.json with *.safetensors, expected a model's folder")
    digests = []
    for path in files:
        with path.open("rb") as file:
            whole = hashlib.sha256()
            while chunk := file.read(1 << 24):
                whole.update(chunk)
        digests.append(whole.hexdigest())
    return hashlib.sha256("".join(digests).encode()).hexdigest()


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
        known = json.loads(Plan.model_validate_json(path.read_text(encoding="utf-8")).model_dump_json())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise BDLoRAError(f"--resume {path}: found {reason}, expected the plan of a run folder") from error
    for name, value in json.loads(plan.model_dump_json()).items():
        if value != known[name]:
            raise BDLoRAError(f"--resume {path}: {name}: found {known[name]}, expected this command's {value}")
