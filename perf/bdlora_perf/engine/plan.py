"""What is measured of the engine's steps: the options, who takes turns, and the flags of the servers."""

from collections.abc import Sequence
from dataclasses import dataclass

from bdlora_perf.engine.beside import LORA, CheckoutOptions, Contender, Deployment
from bdlora_perf.estimate.model_shape import ModelShape
from bdlora_perf.serve.adapters import adapter_flags
from bdlora_perf.serve.systems import SYSTEMS

BASE = SYSTEMS["base"]
CONTENDERS = tuple(
    Contender(f"{system.name}{'-before' * before}", f"{system.label}{', before' * before}", before, system is LORA)
    for before in (False, True)
    for system in (BASE, LORA)
)


@dataclass(frozen=True, kw_only=True)
class EngineOptions(CheckoutOptions):
    """What to measure, beside what `CheckoutOptions` has.

    Attributes:
        shape: of the model.
        dtypes, requests: with the TP degrees the points; a server for each TP degree and dtype, batches of each number
            of requests.
        adapters: how many each server holds, all of them in slots at once.
        rank: r of plain LoRA; BD-LoRA gets 2r, in a block for each rank.
        input_len: tokens of each prompt.
        decode_steps: decode steps of one batch.
    """

    shape: ModelShape
    dtypes: Sequence[str]
    requests: Sequence[int]
    adapters: int
    rank: int
    input_len: int
    decode_steps: int

    @property
    def contenders(self) -> list[Contender]:
        return self.present(CONTENDERS)

    @property
    def deployments(self) -> list[Deployment]:
        return [Deployment(tp, dtype) for tp in self.tps for dtype in self.dtypes]

    @property
    def num_turns(self) -> int:
        return len(self.deployments) * self.rounds * len(self.requests) * len(self.contenders)

    @property
    def batch_tokens(self) -> int:
        """Tokens in the KV cache at the end of the largest batch."""
        return max(self.requests) * (self.input_len + self.decode_steps + 1)

    @property
    def common_flags(self) -> list[str]:
        """Those that are the same for every server, its adapters apart.

        A batch is to be prefilled in one forward pass and decoded together, and nothing is to come out of a cache.
        """
        prefill = max(8192, max(self.requests) * self.input_len)
        sizes = {
            # Ample, for SGLang keeps some free; not all there is, for other servers stand beside this one.
            "--max-total-tokens": 2 * self.batch_tokens + 4096,
            "--max-running-requests": max(self.requests) + 1,
            "--chunked-prefill-size": prefill,
            "--max-prefill-tokens": prefill,
        }
        flags = [word for name, value in sizes.items() for word in (name, str(value))]
        return ["--disable-radix-cache", *flags, *LORA.flags]

    def launch_flags(self, deployment: Deployment) -> list[str]:
        """All of a server's but its port."""
        # Before base requests went without a slot, they took one like an adapter, and would have thrown one out.
        adapters = adapter_flags(self.adapter(self.rank, deployment.tp), self.adapters, self.adapters + 1)
        return self.flags(deployment, [*self.common_flags, *adapters])
