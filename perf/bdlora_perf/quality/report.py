"""The report of what is finished: a sample for each contender, task, rank and seed."""

import math
from collections.abc import Mapping

from bdlora_perf.quality.folder import RunResult, Trial
from bdlora_perf.quality.speed import estimated_speeds, measured_speeds
from bdlora_perf.quality.sweep import Sweep, cell_of
from bdlora_perf.quality.systems import AdapterShape, System
from bdlora_perf.report import schema
from bdlora_perf.report.run import Run
from bdlora_perf.report.schema import Metric, Report, Sample, Value

METRICS = {
    "loss": Metric(label="held-out loss", unit="nats per token", better="lower"),
    "perplexity": Metric(label="held-out perplexity", unit="", better="lower"),
    "accuracy": Metric(label="accuracy", unit="", better="higher"),
    "token_accuracy": Metric(label="accuracy by token", unit="", better="higher"),
    "parameters": Metric(label="parameters", unit=""),
    "output_throughput": Metric(label="output throughput", unit="token/s"),
    "delta_error": Metric(label="conversion error of the delta", unit="", better="lower"),
    "learning_rate": Metric(label="chosen learning rate", unit=""),
}
_ESTIMATED = {"output_throughput": Metric(label="estimated output throughput", unit="token/s")}
_ACCURACY = (
    "Accuracy of a task with completions: the part of them that greedy decoding reproduces to the last token; of a "
    "text, and by token: the part of target tokens that are the likeliest after those before."
)
_GO_ON = "The same command with --resume goes on."
_PAPER = (
    "The paper's figures for Llama-3.1-8B with 8 blocks, read off its plot within 0.0002 and not measured here. LoRA r "
    "16/32/64/128/256: perplexity 2.3155/2.3094/2.3030/2.2967/2.2905, GLUE .7582/.7587/.7601/.7628/.7639. BD-LoRA of "
    "rank 2r: perplexity 2.3179/2.3104/2.3031/2.2959/2.2895, GLUE .7558/.7590/.7617/.7655/.7658."
)
_PEFT = (
    "PEFT's own comparison for Llama-3.2-3B, MLP alone, 2 blocks, not measured here: BD-LoRA of rank 14 with 8.43M "
    "parameters 0.4867, LoRA of rank 10 with 9.46M 0.4943 (accuracy)."
)


def make_report(sweep: Sweep, measured: Run) -> Report:
    """Of ``measured``, with what it means; `samples_of` says what that is."""
    found, expected = len(measured.samples), len(sweep.tasks) * len(sweep.plan.seeds)
    expected *= sum(len(system.shapes) for system in sweep.systems)
    unfinished = [*measured.broken_off(expected), _GO_ON] if measured.interrupted else []
    if not unfinished and found < expected:
        unfinished = [f"{found} of {expected} figures are finished; the others are missing here."]
    _, speed_note = _speeds(sweep)
    present = {name for sample in measured.samples for name in sample.metrics}
    metrics = METRICS if sweep.options.speed else {**METRICS, **_ESTIMATED}
    return Report(
        kind="quality",
        title="Quality at equal parameters",
        settings=_settings(sweep),
        systems={
            system.name: schema.System(label=system.label, details=_details(sweep, system)) for system in sweep.systems
        },
        metrics={name: metric for name, metric in metrics.items() if name in present},
        baselines=("lora",),
        samples=tuple(measured.samples),
        notes=(*unfinished, _ACCURACY, _base_note(sweep), speed_note, _PAPER, _PEFT),
        **measured.head(),
    )


def samples_of(sweep: Sweep) -> list[Sample]:
    """Everything that is finished in the folder, whichever part or machine did it."""
    speeds, _ = _speeds(sweep)
    runs = (
        (system.name, task, r, seed, sweep.chosen_run(cell_of(system, task, r), seed))
        for system in sweep.systems
        for task in sweep.tasks
        for r in system.shapes
        for seed in sweep.plan.seeds
    )
    return [
        Sample(system=system, point={"task": task, "r": r}, round=seed, metrics=_metrics(run, result, speeds))
        for system, task, r, seed, run in runs
        if run is not None and (result := sweep.folder.read(run.name)) is not None
    ]


def _metrics(run: Trial, result: RunResult, speeds: Mapping[AdapterShape, float]) -> dict[str, float]:
    figures = {
        **result.model_dump(),
        "perplexity": math.exp(result.loss),
        "output_throughput": speeds.get(run.cell.shape),
        "learning_rate": run.learning_rate or None,
    }
    return {name: float(figures[name]) for name in METRICS if figures[name] is not None}


def _speeds(sweep: Sweep) -> tuple[Mapping[AdapterShape, float], str]:
    options = sweep.options
    if options.speed is not None:
        note = f"Throughput: measured, from the report of perf serve in {options.speed}."
        return measured_speeds(options.speed), note
    if sweep.plan.target_modules != "all":
        return {}, "Throughput: none, it is estimated for adapters on all modules alone."
    shapes = {shape for system in sweep.systems for shape in system.shapes.values()}
    return estimated_speeds(str(options.model), shapes, options.gpu, options.tp), (
        f"Throughput: estimated, not measured, for this model in bfloat16 on {options.tp} x {options.gpu} by bdlora "
        "perf estimate; LoRA is fully sharded."
    )


def _base_note(sweep: Sweep) -> str:
    results = {name: sweep.base_result(task) for name, task in sweep.tasks.items()}
    words = (f"{name} {result.loss:.4f} ({result.accuracy:.3f})" for name, result in results.items())
    return f"The base model without an adapter, held-out loss (accuracy): {', '.join(words)}."


def _details(sweep: Sweep, system: System) -> dict[str, Value]:
    details: dict[str, Value] = {"kind": system.kind, "family": system.family}
    if system.method == "bd":
        details["initial values"] = system.init
    for r, shape in system.shapes.items():
        ratio = shape.parameters(sweep.modules) / AdapterShape(r).parameters(sweep.modules)
        details |= {f"r={r}: rank": shape.rank, f"r={r}: parameters over LoRA's": round(ratio, 3)}
    return details


def _settings(sweep: Sweep) -> dict[str, Value]:
    plan = sweep.plan
    rates, heal_rates = (
        ", ".join(f"{rate:g}" for rate in rates) for rates in (plan.learning_rates, plan.heal_learning_rates)
    )
    size = sweep.trainer.base.num_parameters()
    tasks: dict[str, Value] = {
        f"task {name}": f"{len(task.train)} examples to train on, SHA-256 {plan.tasks[name][:12]}"
        for name, task in sweep.tasks.items()
    }
    return {
        "model": f"{sweep.options.model.name}, {size:,} parameters, SHA-256 {plan.model[:12]}",
        **tasks,
        "held-out examples": f"{plan.validation_examples} to choose the learning rate, {plan.test_examples} reported",
        "seeds": ", ".join(map(str, plan.seeds)),
        "learning rates": f"{rates}; each method's best for the first seed",
        "learning rates of healing": heal_rates,
        "optimizer": "AdamW, warm-up of a tenth, then linear to zero",
        "steps": plan.steps,
        "steps of healing": plan.heal_steps,
        "batch size": plan.batch_size,
        "sequence length": plan.sequence_length,
        "target modules": plan.target_modules,
        "lora_alpha / r": plan.scaling,
        "initial values": plan.inits[0],
        "calibration": f"{plan.calibration_tokens} tokens of the training split",
        "dtype of the frozen base": plan.dtype,
        "device": sweep.options.device,
    }
