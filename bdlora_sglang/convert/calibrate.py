"""Collecting moments: the base model runs over a text, and hooks see what the adapter's modules are given."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch

from bdlora_sglang.adapter import BlockSide
from bdlora_sglang.convert.blocks import with_equal_ranks
from bdlora_sglang.convert.moments import Moments, adapter_digest
from bdlora_sglang.convert.options import Calibration
from bdlora_sglang.convert.plan import Plan
from bdlora_sglang.convert.truncate import blocks_share_a, moments_shape
from bdlora_sglang.errors import BDLoRAError

# Characters of the text that are tokenized at a time.
_CHUNK_CHARACTERS = 1 << 16


def collect_moments(plan: Plan, calibration: Calibration) -> Moments:
    """Run the base model of ``calibration`` over its text, on the plan's device, and take every module's moments.

    The text is read and tokenized in pieces. Beside the model, memory holds the adapter's A in float32 and the moments.

    Raises:
        BDLoRAError: transformers is missing, the text is missing or empty, the model cannot be loaded, or it lacks a
            module of the adapter.
    """
    assert calibration.text is not None and calibration.model is not None
    text = Path(calibration.text)
    if not text.is_file():
        raise BDLoRAError(f"--calibrate: found no file {text}, expected a text file")
    tokenizer, model = load_model(calibration.model, plan.device)
    collectors = {module.name: _Collector(plan, module.name) for module in plan.converted}
    hooks = [_submodule(model, name).register_forward_pre_hook(c.hook) for name, c in collectors.items()]
    tokens = 0
    try:
        with torch.inference_mode():
            for ids in _sequences(text, tokenizer, calibration):
                model(input_ids=torch.tensor([ids], device=plan.device), use_cache=False)
                tokens += len(ids)
    finally:
        for hook in hooks:
            hook.remove()
    if not tokens:
        raise BDLoRAError(f"--calibrate: found no tokens in {text}, expected a text")
    by_module = {name: (collector.sum / tokens).cpu() for name, collector in collectors.items()}
    return Moments(by_module, adapter_digest(plan), plan.nblocks, tokens)


def load_model(name: str, device: torch.device) -> tuple[Any, Any]:
    """A causal language model in evaluation mode on ``device``, in its stored type, and its tokenizer.

    Raises:
        BDLoRAError: transformers is missing, or cannot load it.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise BDLoRAError("--model: found no transformers, expected it installed (pip install transformers)") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BDLoRAError(f"--model: found '{name}' ({reason}), expected a causal language model") from error
    return tokenizer, cast(torch.nn.Module, model).to(device).eval()


def _submodule(model: torch.nn.Module, name: str) -> torch.nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise BDLoRAError(f"--model: found no module '{name}', expected the adapter's base model") from error


def _sequences(text: Path, tokenizer: Any, calibration: Calibration) -> Iterator[list[int]]:
    """Token ids in sequences of full length (the last may be shorter), ``max_tokens`` together at most."""
    left, pending = calibration.max_tokens, list[int]()
    with text.open(encoding="utf-8", errors="replace") as file:
        while left and (chunk := file.read(_CHUNK_CHARACTERS)):
            pending += tokenizer(chunk, add_special_tokens=False)["input_ids"]
            while left and len(pending) >= calibration.sequence_length:
                ids, pending = (
                    pending[: calibration.sequence_length],
                    pending[calibration.sequence_length :],
                )
                yield ids[:left]
                left -= len(ids[:left])
    if left and pending:
        yield pending[:left]


class _Collector:
    """Sums ``z z^T`` over the inputs of one module."""

    def __init__(self, plan: Plan, module: str) -> None:
        blocks = with_equal_ranks(plan.read(plan.adapter.modules[module]))
        side = plan.sides[module]
        self.sum = torch.zeros(moments_shape(blocks, side), dtype=torch.float64, device=plan.device)
        if side is BlockSide.B and blocks_share_a(blocks):
            blocks = blocks[:1]
        self._a = torch.stack([block.a for block in blocks]).to(plan.device, torch.float32)
        self._project: Callable[[torch.Tensor], torch.Tensor] = (
            self._own_inputs if side is BlockSide.A else self._same_inputs
        )

    def hook(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].detach().flatten(0, -2).to(self._a)
        z = self._project(x).to(self.sum)
        self.sum += z.transpose(-2, -1) @ z

    def _own_inputs(self, x: torch.Tensor) -> torch.Tensor:
        """Row-parallel, x (tokens, in): z (tokens, N R), every block reads its own columns."""
        parts = x.view(len(x), self._a.shape[0], -1)
        return torch.einsum("tkn,krn->tkr", parts, self._a).flatten(1)

    def _same_inputs(self, x: torch.Tensor) -> torch.Tensor:
        """Column-parallel, x (tokens, in): z (N or 1, tokens, R), every block reads all columns."""
        return torch.einsum("tn,krn->ktr", x, self._a)
