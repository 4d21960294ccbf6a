"""The runs of a plan: in rounds by seed, so that whatever is finished makes a report."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from bdlora_perf.quality.data import Example, Task, calibration_text, load_task
from bdlora_perf.quality.folder import Cell, RunFolder, RunResult, Trial
from bdlora_perf.quality.plan import QualityOptions
from bdlora_perf.quality.systems import AdapterShape, System, make_systems, target_modules
from bdlora_perf.quality.train import Trainer, count_parameters
from bdlora_perf.report.schema import write_atomically
from bdlora_sglang.convert import Calibration, ConvertOptions, RankChoice, lora2bd

if TYPE_CHECKING:
    from peft import PeftModel

# JSON has no infinity. Training that diverged is worse than a uniform guess over any vocabulary.
_DIVERGED = 100.0
_UNTRAINED = ("truncated", "calibrated")


def cell_of(system: System, task: str, r: int) -> Cell:
    source = 0 if system.method in ("lora", "bd") else r
    return Cell(task, system.method, system.shapes[r], system.init, source)


def cells_by_rank(systems: list[System], task: str, ranks: tuple[int, ...]) -> Iterator[list[Cell]]:
    """Groups of cells that need no other group: LoRA of one rank comes first, what is converted from it after it."""
    seen: set[Cell] = set()
    for r in ranks:
        cells = [cell_of(system, task, r) for system in systems if r in system.shapes]
        new = [cell for cell in dict.fromkeys(cells) if cell not in seen]
        seen.update(new)
        yield new


class Sweep:
    """A plan at work in its folder."""

    def __init__(self, options: QualityOptions) -> None:
        """Loads the model and the tasks; raises `BDLoRAError` for what does not fit together."""
        plan = options.plan
        self.options, self.plan = options, plan
        self.trainer = Trainer.load(
            options.model, options.device, plan.dtype, plan.target_modules, plan.scaling, plan.batch_size
        )
        self.modules = target_modules(self.trainer.base, plan.target_modules)
        self.systems = make_systems(self.modules, plan.methods, plan.ranks, plan.blocks, plan.multiples, plan.inits)
        held_out = plan.validation_examples, plan.test_examples
        self.tasks: dict[str, Task] = {
            name: load_task(path, self.trainer.tokenizer, plan.sequence_length, held_out)
            for name, path in options.data.items()
        }
        self.folder = RunFolder(options.output)

    @property
    def groups(self) -> list[list[Cell]]:
        """Those of this part."""
        groups = [group for task in self.tasks for group in cells_by_rank(self.systems, task, self.plan.ranks)]
        k, n = self.options.part
        return groups[k - 1 :: n]

    @property
    def num_runs(self) -> int:
        """Of this part."""
        first = sum(len(self._first_runs(cell)) for group in self.groups for cell in group)
        return first + (len(self.plan.seeds) - 1) * sum(map(len, self.groups))

    def runs(self) -> Iterator[Trial]:
        """Those of this part in their order; the later ones are known when those before are finished (`finish`)."""
        for seed in self.plan.seeds:
            for cell in (cell for group in self.groups for cell in group):
                if seed == self.plan.seeds[0]:
                    yield from self._first_runs(cell)
                elif run := self.chosen_run(cell, seed):
                    yield run

    def is_finished(self, run: Trial) -> bool:
        return self.folder.read(run.name) is not None

    def finish(self, run: Trial) -> None:
        """Train or convert, evaluate, and write the result."""
        self.folder.write(self._convert(run) if run.cell.source else self._train(run))

    def base_result(self, task: Task) -> RunResult:
        """The base model's figures, worked out once."""
        name = f"{task.name}-base"
        result = self.folder.read(name)
        if result is None:
            validation, test = (self.trainer.evaluate(self.trainer.base, task, part) for part in _held_out(task))
            result = RunResult(name=name, parameters=0, validation_loss=validation.loss, **asdict(test))
            self.folder.write(result)
        return result

    def chosen_run(self, cell: Cell, seed: int) -> Trial | None:
        """With the learning rate that was best on the validation split for the first seed; None while that is open."""
        if cell.method in _UNTRAINED:
            return Trial(cell, seed, 0.0)
        rates = self._rates(cell)
        if len(rates) == 1:
            return Trial(cell, seed, rates[0])
        first = self.plan.seeds[0]
        losses: dict[float, float] = {}
        for rate in rates:
            result = self.folder.read(Trial(cell, first, rate).name)
            if result is None:
                return None
            losses[rate] = result.validation_loss
        return Trial(cell, seed, min(losses, key=lambda rate: (losses[rate], rate)))

    def _rates(self, cell: Cell) -> tuple[float, ...]:
        return self.plan.heal_learning_rates if cell.method == "healed" else self.plan.learning_rates

    def _first_runs(self, cell: Cell) -> list[Trial]:
        """Those of the first seed: every learning rate."""
        rates = (0.0,) if cell.method in _UNTRAINED else self._rates(cell)
        return [Trial(cell, self.plan.seeds[0], rate) for rate in rates]

    def _train(self, run: Trial) -> RunResult:
        task = self.tasks[run.cell.task]
        model = self.trainer.new_adapter(run.cell.shape, run.seed, run.cell.init)
        losses = self.trainer.train(model, task.train, self.plan.steps, run.learning_rate, run.seed)
        if run.cell.method == "lora":
            self.folder.save_adapter(model, run)
        return self._result(run, model, losses)

    def _convert(self, run: Trial) -> RunResult:
        cell, task = run.cell, self.tasks[run.cell.task]
        lora = self.chosen_run(Cell(cell.task, "lora", AdapterShape(cell.source), cell.init), run.seed)
        assert lora is not None, "LoRA comes first in its group"
        calibration = None
        if cell.method != "truncated":
            tokens, length = self.plan.calibration_tokens, self.plan.sequence_length
            calibration = Calibration(str(self._text(task)), str(self.options.model), None, tokens, length)
        options = ConvertOptions(
            cell.shape.nblocks, RankChoice(rank=cell.shape.rank), calibration=calibration, device=self.options.device
        )
        with tempfile.TemporaryDirectory() as temporary:
            converted = Path(temporary) / "adapter"
            report = lora2bd(self.folder.adapter(lora), converted, options)
            model = self.trainer.read_adapter(converted, trainable=True)
        losses: list[float] = []
        if cell.method == "healed":
            losses = self.trainer.train(model, task.train, self.plan.heal_steps, run.learning_rate, run.seed)
        return self._result(run, model, losses, report.error)

    def _result(
        self, run: Trial, model: "PeftModel", losses: list[float], delta_error: float | None = None
    ) -> RunResult:
        task = self.tasks[run.cell.task]
        validation, test = (self.trainer.evaluate(model, task, part) for part in _held_out(task))
        ends = [_finite(losses[i]) if losses else None for i in (0, -1)]
        return RunResult(
            name=run.name,
            parameters=count_parameters(model),
            first_loss=ends[0],
            last_loss=ends[1],
            validation_loss=_finite(validation.loss),
            loss=_finite(test.loss),
            accuracy=test.accuracy,
            token_accuracy=test.token_accuracy,
            delta_error=delta_error,
        )

    def _text(self, task: Task) -> Path:
        path = self.folder.texts / f"{task.name}.txt"
        text = calibration_text(task, self.trainer.tokenizer, self.plan.calibration_tokens)
        write_atomically(path, text)
        return path


def _held_out(task: Task) -> tuple[Sequence[Example], Sequence[Example]]:
    return task.validation, task.test


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else _DIVERGED
