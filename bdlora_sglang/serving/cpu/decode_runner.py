"""SGLang's eager runner with decode steps that are recorded, and computed again without the model's Python."""

import logging
from dataclasses import fields, replace
from enum import Enum
from functools import cache
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.forward_context import forward_context, get_forward_context
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.model_executor.runner.eager_runner import EagerRunner
from sglang.srt.utils.device_timer import device_timer_ctx

from bdlora_sglang.serving.cpu.recording import Recorder, Recording

logger = logging.getLogger(__name__)

_FIELDS = tuple(field.name for field in fields(ForwardBatch))
# Recordings that may differ, as the model fills caches of its own, before batches of a kind stay eager.
_TRIES = 4


class RecordingRunner(EagerRunner):
    """Replays a decode step where two recordings of batches of its kind agreed; all else is as SGLang does it.

    A kind is the number of requests, whether any has an adapter, and the batch's flags.
    """

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__(model_runner, run_warmup=False)
        self._steps: dict[tuple[object, ...], DecodeStep] = {}

    @property
    def replayed_kinds(self) -> int:
        """Kinds of batches that are replayed."""
        return sum(step.is_replayed for step in self._steps.values())

    def _execute_decode(self, forward_batch: ForwardBatch, pp_proxy_tensors: Any = None) -> Any:
        runner = self.model_runner
        if pp_proxy_tensors is not None or self.enable_pdmux or hasattr(runner.model, "prepare_forward_batch"):
            return super()._execute_decode(forward_batch, pp_proxy_tensors)
        batch = self.load_batch(forward_batch)
        if batch.needs_forward_metadata_init():
            runner.attn_backend.init_forward_metadata(batch)
        lora = None if runner.lora_manager is None else runner.lora_manager.lora_backend.batch_info
        values = [getattr(batch, name) for name in _FIELDS]
        kind = (lora is not None and lora.has_active_lora, batch.batch_size, *map(_kind, values))
        given = [
            batch,
            lora and lora.segments,
            *(value if isinstance(value, torch.Tensor) else None for value in values),
        ]
        step = self._steps.get(kind)
        if step is None:
            step = self._steps[kind] = DecodeStep()
        with (
            device_timer_ctx(runner.device_timer, "decode"),
            forward_context(get_forward_context(), forward_batch=batch),
        ):
            return step.forward(runner.model, batch, given)


class DecodeStep:
    """That of one kind of batch: its recording, or how far it is from one."""

    def __init__(self) -> None:
        self.is_replayed = False
        self._recording: Recording | None = None
        self._tries = _TRIES
        # The output without its tensors, and where a recording leaves those.
        self._output: LogitsProcessorOutput | None = None
        self._places: dict[str, int] = {}

    def forward(self, model: Any, batch: ForwardBatch, given: list[object]) -> LogitsProcessorOutput:
        """The model's output; ``given`` are the batch, LoRA's segments, and the batch's tensors."""
        if self.is_replayed:
            assert self._recording is not None and self._output is not None
            values = self._recording.run(given)
            return replace(self._output, **{name: values[place] for name, place in self._places.items()})
        if not self._tries:
            return model.forward(batch.input_ids, batch.positions, batch)
        with Recorder(given) as recorder:
            output = model.forward(batch.input_ids, batch.positions, batch)
        if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
            recorder.refuse("hooks of modules")
        self._take(recorder, output)
        return output

    def _take(self, recorder: Recorder, output: LogitsProcessorOutput) -> None:
        values = {field.name: getattr(output, field.name) for field in fields(output)}
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        places = {name: recorder.place_of(tensor) for name, tensor in tensors.items()}
        recording, self._tries = recorder.recording, self._tries - 1
        if recording.obstacle is not None:
            _tell(recording.obstacle)
            self._recording, self._tries = None, 0
            return
        if self._recording is not None and places == self._places and recording.agrees_with(self._recording):
            self.is_replayed = True
            self._output = replace(output, **dict.fromkeys(places))
        elif not self._tries:
            _tell("something else in each of them")
        self._recording, self._places = recording, places


def _kind(value: object) -> object:
    """What of a batch's field a model may decide by: a flag, and whether there is anything."""
    return value if isinstance(value, bool | Enum) else value is None


@cache
def _tell(obstacle: str) -> None:
    logger.info("Decode steps that call %s stay eager", obstacle)
