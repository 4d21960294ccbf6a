"""The run folder: ``plan.json``, a JSON file for each finished run, and the trained LoRA that is converted."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from bdlora_perf.quality.init import Init
from bdlora_perf.quality.systems import AdapterShape, Method
from bdlora_perf.report.schema import write_atomically
from bdlora_sglang.errors import BDLoRAError

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Cell:
    """A method on a task, over seeds: what learning rates are chosen for.

    ``source`` is the rank of the LoRA that is converted, 0 for what is trained from the start; ``init`` is that of the
    adapter, or of the converted LoRA.
    """

    task: str
    method: Method
    shape: AdapterShape
    init: Init
    source: int = 0

    @property
    def name(self) -> str:
        parts = [self.task, self.method, f"r{self.shape.rank}"]
        if self.shape.nblocks > 1:
            parts.append(f"n{self.shape.nblocks}")
        if self.source:
            parts.append(f"of-r{self.source}")
        if self.method == "bd":
            parts.append(self.init)
        return "-".join(parts)


@dataclass(frozen=True)
class Trial:
    """A cell with one seed and learning rate; the latter is 0 for a conversion without training."""

    cell: Cell
    seed: int
    learning_rate: float

    @property
    def name(self) -> str:
        rate = f"-lr{self.learning_rate:g}" if self.learning_rate else ""
        return f"{self.cell.name}-seed{self.seed}{rate}"


class RunResult(BaseModel):
    """Of one run; it holds no times, so that the same run gives the same bytes.

    ``validation_loss`` chooses the learning rate, the others are of the test split. ``delta_error`` is a conversion's
    relative Frobenius error.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    parameters: int
    first_loss: float | None = None
    last_loss: float | None = None
    validation_loss: float
    loss: float
    accuracy: float
    token_accuracy: float
    delta_error: float | None = None


class RunFolder:
    """Finished runs are never done again. Files appear whole: a run that was broken off is as if never begun."""

    def __init__(self, folder: Path) -> None:
        self._runs, self._adapters, self.texts = (folder / name for name in ("runs", "adapters", "calibration"))
        try:
            for path in (self._runs, self._adapters, self.texts):
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BDLoRAError(f"--output {folder}: found {error.strerror}, expected to make folders there") from error

    def read(self, name: str) -> RunResult | None:
        """None where it is not finished; raises `BDLoRAError` for a file that is no run's."""
        path = self._runs / f"{name}.json"
        try:
            result = RunResult.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise BDLoRAError(
                f"{path}: found {str(error).splitlines()[0]}, expected a finished run (delete it to do it again)"
            ) from error
        if result.name != name:
            raise BDLoRAError(f"{path}: found the run '{result.name}', expected '{name}' (delete it to do it again)")
        return result

    def write(self, result: RunResult) -> None:
        write_atomically(self._runs / f"{result.name}.json", result.model_dump_json(indent=1) + "\n")

    def save_adapter(self, model: "PeftModel", run: Trial) -> None:
        """Before its result is written: a finished LoRA has its adapter."""
        folder = self._adapters / run.name
        with TemporaryDirectory(prefix=".", dir=self._adapters) as partial:
            model.save_pretrained(f"{partial}/adapter")
            shutil.rmtree(folder, ignore_errors=True)
            Path(partial, "adapter").rename(folder)

    def adapter(self, run: Trial) -> Path:
        """Raises `BDLoRAError` where the folder came without its adapters."""
        folder = self._adapters / run.name
        if not folder.is_dir():
            raise BDLoRAError(
                f"{folder}: found no such folder, expected the LoRA of the finished run {run.name} (copy the whole run "
                "folder, or delete that run's JSON to train it again)"
            )
        return folder
