"""A decode step of one kind of batch against its model, forward by forward."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput

from bdlora_sglang.serving.cpu.decode_runner import DecodeStep


class Model(torch.nn.Module):
    """Counts how often its Python runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Linear(4, 4)
        self.forwards = 0

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, batch: Any) -> LogitsProcessorOutput:
        self.forwards += 1
        hidden = self.inner(input_ids[:, None] * torch.ones(4)) + positions[:, None]
        return LogitsProcessorOutput(next_token_logits=hidden.relu(), hidden_states=hidden)


def run(step: DecodeStep, model: Model, seed: int) -> None:
    ids, positions = torch.randint(0, 9, (2, 3), generator=torch.Generator().manual_seed(seed))
    batch: Any = SimpleNamespace(input_ids=ids, positions=positions)
    with torch.inference_mode():
        found = step.forward(model, batch, [batch, ids, positions])
        expected = Model().forward(ids, positions, batch)
    assert found.next_token_logits is not None and expected.next_token_logits is not None
    assert torch.equal(found.next_token_logits, expected.next_token_logits)
    assert found.hidden_states is not None and torch.equal(found.hidden_states, expected.hidden_states)
    assert found.input_token_logprobs is None


def test_a_step_is_replayed_once_two_agree() -> None:
    step, model = DecodeStep(), Model()
    for seed in range(5):
        run(step, model, seed)
        assert step.is_replayed == (seed >= 1)
    assert model.forwards == 2


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_model_with_hooks_stays_eager(register: str) -> None:
    step, model, calls = DecodeStep(), Model(), []
    getattr(model.inner, register)(lambda *args: calls.append(len(args)))
    for seed in range(6):
        run(step, model, seed)
    assert not step.is_replayed and model.forwards == len(calls) == 6
