"""PEFT's own forward: the tokens and log-probabilities that a served adapter must reproduce."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from bdlora_perf.synthetic.models import model_class

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Generation:
    """What greedy decoding chose, one entry for each new token.

    ``logprobs`` are natural logarithms over the whole vocabulary at temperature 1. ``gaps`` say how far the chosen
    token's logit lies above the runner-up's: an engine whose logits err by more than half of it may choose another.
    """

    tokens: list[int]
    logprobs: list[float]
    gaps: list[float]


class PeftReference:
    """A base model in transformers with adapters attached by PEFT, all loaded once and kept.

    Adapters are computed in the type of the base model, like an engine does. (PEFT's default for adapters narrower than
    float32 is to compute them in float32 whatever the type of the model.)
    """

    def __init__(self, model_folder: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        from transformers import AutoConfig

        self._dtype = dtype
        auto_class = model_class(AutoConfig.from_pretrained(model_folder))
        model = auto_class.from_pretrained(model_folder, dtype=dtype, attn_implementation="eager")
        self._base = cast(Any, model).to(device).eval()
        self._peft: PeftModel | None = None
        self._names: dict[Path, str] = {}

    @property
    def config(self) -> Any:
        """The base model's config."""
        return self._base.config

    def generate(
        self, prompt: Sequence[int], adapter: str | Path | None, max_new_tokens: int, **seen: torch.Tensor
    ) -> Generation:
        """Decode greedily, on past end-of-sequence tokens.

        Args:
            prompt: token ids, at least one.
            adapter: a PEFT adapter's folder, read at its first use; None for the base model alone.
            max_new_tokens: the number of tokens to generate.
            **seen: what comes with the prompt, such as ``pixel_values``, as the model's processor makes it.
        """
        generation = Generation([], [], [])
        step, cache = list(prompt), None
        with self._activated(adapter) as model, torch.inference_mode():
            for _ in range(max_new_tokens):
                ids = torch.tensor([step], device=self._base.device)
                output = model(input_ids=ids, past_key_values=cache, use_cache=True, **seen)
                logits_V = output.logits[0, -1].float()
                best, runner_up = logits_V.topk(2).values.tolist()
                token = int(logits_V.argmax())
                generation.tokens.append(token)
                generation.logprobs.append(float(logits_V.log_softmax(dim=-1)[token]))
                generation.gaps.append(best - runner_up)
                step, cache, seen = [token], output.past_key_values, {}
        return generation

    def logprobs(self, prompt: Sequence[int], adapter: str | Path | None, tokens: Sequence[int]) -> list[float]:
        """The log-probability of each of ``tokens`` after the prompt and the tokens before it, from one forward.

        For comparing log-probabilities where the tokens need not be the greedy ones, as between bfloat16 engines.
        """
        logits_TV = self._logits(prompt, adapter, tokens)
        chosen = torch.tensor(list(tokens), device=self._base.device)[:, None]
        return [float(value) for value in logits_TV.log_softmax(dim=-1).gather(1, chosen)[:, 0]]

    def is_greedy(self, prompt: Sequence[int], adapter: str | Path | None, tokens: Sequence[int]) -> bool:
        """Whether greedy decoding gives ``tokens``, from one forward: each is the likeliest after those before it."""
        return self._logits(prompt, adapter, tokens).argmax(dim=-1).tolist() == list(tokens)

    def _logits(self, prompt: Sequence[int], adapter: str | Path | None, tokens: Sequence[int]) -> torch.Tensor:
        """What each of ``tokens`` is chosen by: (token, vocabulary), float32."""
        with self._activated(adapter) as model, torch.inference_mode():
            ids = torch.tensor([[*prompt, *tokens]], device=self._base.device)
            return cast(torch.Tensor, model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float())

    def forget(self, adapter: str | Path) -> None:
        """Drop an adapter that was read, so that the next use reads its folder again."""
        name = self._names.pop(Path(adapter).resolve(), None)
        if name is not None and self._peft is not None:
            self._peft.delete_adapter(name)

    @contextmanager
    def _activated(self, adapter: str | Path | None) -> Iterator[Any]:
        if adapter is not None:
            model, name = self._load(Path(adapter).resolve())
            model.set_adapter(name)
            yield model
        elif self._peft is not None:
            with self._peft.disable_adapter():
                yield self._peft
        else:
            yield self._base

    def _load(self, folder: Path) -> "tuple[PeftModel, str]":
        from peft import PeftModel

        if self._peft is not None and folder in self._names:
            return self._peft, self._names[folder]
        name = f"adapter_{len(self._names)}_{folder.name}".replace(".", "_")
        if self._peft is None:
            self._peft = PeftModel.from_pretrained(self._base, str(folder), adapter_name=name)
        else:
            self._peft.load_adapter(str(folder), adapter_name=name)
        self._names[folder] = name
        self._peft.to(self._dtype).eval()
        return self._peft, name
