"""The runs of a plan: in rounds by seed, so that whatever is finished makes a report."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from bdlora_perf.quality.data import Task, calibration_text, load_task
from bdlora_perf.quality.folder import Cell, RunFolder, RunResult, Trial
from bdlora_perf.quality.plan import QualityOptions
from bdlora_perf.quality.systems import AdapterShape, System, make_systems, target_modules
from bdlora_perf.quality.train import Trainer
from bdlora_perf.report.schema import write_atomically
from bdlora_sglang.convert import Calibration, ConvertOptions, RankChoice, lora2bd

if TYPE_CHECKING:
    from peft import PeftModel

_UNTRAINED = ("truncated", "calibrated")


def cell_of(system: System, task: str, r: int) -> Cell:
    source = 0 if system.method in ("lora", "bd") else r
    return Cell(task, system.method, system.shapes[r], system.init, source)


class Sweep:
    """A plan at work in its folder."""

    def __init__(self, options: QualityOptions) -> None:
        """Loads the model and the tasks; raises `BDLoRAError` for what does not fit together."""
        plan = options.plan
        self.options, self.plan = options, plan
        self.trainer = Trainer.load(options)
        self.modules = target_modules(self.trainer.base, plan.target_modules)
        self.systems = make_systems(self.modules, plan.methods, plan.ranks, plan.blocks, plan.multiples, plan.inits)
        held_out = plan.validation_examples, plan.test_examples
        self.tasks: dict[str, Task] = {
            name: load_task(path, self.trainer.tokenizer, plan.sequence_length, held_out)
            for name, path in options.data.items()
        }
        self.folder = RunFolder(options.output)

    @property
    def cells(self) -> list[Cell]:
        """Those of this part. LoRA of one rank comes before what is converted from it, and in the same part."""
        seen: set[Cell] = set()
        groups: list[list[Cell]] = []
        for task in self.tasks:
            for r in self.plan.ranks:
                cells = dict.fromkeys(cell_of(system, task, r) for system in self.systems if r in system.shapes)
                groups.append([cell for cell in cells if cell not in seen])
                seen.update(cells)
        k, n = self.options.part
        return [cell for group in groups[k - 1 :: n] for cell in group]

    @property
    def num_runs(self) -> int:
        """Of this part."""
        return sum(len(self._rates(cell)) + len(self.plan.seeds) - 1 for cell in self.cells)

    def runs(self) -> Iterator[Trial]:
        """Those of this part in their order; the later ones are known when those before are finished (`finish`)."""
        for seed in self.plan.seeds:
            for cell in self.cells:
                if seed == self.plan.seeds[0]:
                    yield from self._first_runs(cell)
                elif run := self.chosen_run(cell, seed):
                    yield run

    def is_finished(self, run: Trial) -> bool:
        return self.folder.read(run.name) is not None

    def finish(self, run: Trial) -> None:
        """Train or convert, evaluate, and write the result."""
        cell, task, trainer = run.cell, self.tasks[run.cell.task], self.trainer
        if cell.source:
            model, error = self._converted(run)
        else:
            model, error = trainer.new_adapter(cell.shape, run.seed, cell.init), None
        losses: list[float] = []
        if cell.method not in _UNTRAINED:
            steps = self.plan.heal_steps if cell.method == "healed" else self.plan.steps
            losses = trainer.train(model, task.train, steps, run.learning_rate, run.seed)
        if cell.method == "lora":
            self.folder.save_adapter(model, run)
        self.folder.write(self._result(run.name, model, task, losses, error))

    def base_result(self, task: Task) -> RunResult:
        """The base model's figures, worked out once."""
        result = self.folder.read(f"{task.name}-base")
        if result is None:
            result = self._result(f"{task.name}-base", self.trainer.base, task)
            self.folder.write(result)
        return result

    def chosen_run(self, cell: Cell, seed: int) -> Trial | None:
        """With the learning rate that was best on the validation split for the first seed; None while that is open."""
        rates = self._rates(cell)
        if len(rates) == 1:
            return Trial(cell, seed, rates[0])
        results = [self.folder.read(run.name) for run in self._first_runs(cell)]
        losses = [result.validation_loss for result in results if result is not None]
        if len(losses) < len(rates):
            return None
        _, best = min(zip(losses, rates, strict=True))
        return Trial(cell, seed, best)

    def _rates(self, cell: Cell) -> tuple[float, ...]:
        if cell.method in _UNTRAINED:
            return (0.0,)
        return self.plan.heal_learning_rates if cell.method == "healed" else self.plan.learning_rates

    def _first_runs(self, cell: Cell) -> list[Trial]:
        """Those of the first seed: every learning rate."""
        return [Trial(cell, self.plan.seeds[0], rate) for rate in self._rates(cell)]

    def _converted(self, run: Trial) -> "tuple[PeftModel, float | None]":
        """What becomes of the trained LoRA, and the error of its delta."""
        cell, task = run.cell, self.tasks[run.cell.task]
        lora = self.chosen_run(Cell(cell.task, "lora", AdapterShape(cell.source), cell.init), run.seed)
        assert lora is not None, "LoRA comes first in its group"
        calibration = None
        if cell.method != "truncated":
            tokens, length = self.plan.calibration_tokens, self.plan.sequence_length
            text = self.folder.texts / f"{task.name}.txt"
            write_atomically(text, calibration_text(task, self.trainer.tokenizer, tokens))
            calibration = Calibration(str(text), str(self.options.model), None, tokens, length)
        choice, device = RankChoice(rank=cell.shape.rank), self.options.device
        options = ConvertOptions(cell.shape.nblocks, choice, calibration=calibration, device=device)
        with TemporaryDirectory() as temporary:
            converted = Path(temporary) / "adapter"
            report = lora2bd(self.folder.adapter(lora), converted, options)
            return self.trainer.read_adapter(converted), report.error

    def _result(
        self, name: str, model: Any, task: Task, losses: Sequence[float] = (), delta_error: float | None = None
    ) -> RunResult:
        validation, test = (self.trainer.evaluate(model, task, examples) for examples in (task.validation, task.test))
        return RunResult(
            name=name,
            parameters=sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
            first_loss=losses[0] if losses else None,
            last_loss=losses[-1] if losses else None,
            validation_loss=validation.loss,
            **asdict(test),
            delta_error=delta_error,
        )
