"""One run of load: SGLang's own request functions, so that every server is asked and timed by the same client.

``sglang.benchmark.serving`` itself cannot draw adapters by Zipf's law, replay timestamps, or say which adapter a
request had; its functions for one request to each kind of API can be called alone.
"""

import asyncio
import importlib
import random
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Literal

from bdlora_perf.serve.workload import Workload
from bdlora_sglang.errors import BDLoRAError

# SGLang's names of its request functions.
Api = Literal["sglang", "vllm"]
API_LABELS: dict[Api, str] = {"sglang": "SGLang's /generate", "vllm": "OpenAI's /v1/completions"}
_PATHS: dict[Api, str] = {"sglang": "/generate", "vllm": "/v1/completions"}
_POLL_SECONDS = 0.5
# In every vocabulary, and none of them special.
_TOKENS = range(10, 250)
_WORDS = ("the", "of", "and", "to", "in", "is", "was", "for", "on", "as", "with", "by", "at", "from", "it", "an")
# More wait for the whole sweep than tell anything.
_MOST_WARMUPS = 32
_WARMUP_TOKENS = 32


@dataclass(frozen=True)
class Request:
    """What is sent: random tokens, ``at`` so many seconds after the first, or at once where the load is closed."""

    prompt: list[int]
    output_len: int
    adapter: str | None
    at: float | None = None


@dataclass(frozen=True)
class Target:
    """A server and how it is asked. ``text``: it takes no tokens, so that a prompt is as many short words."""

    url: str
    api: Api
    model: str
    text: bool = False


@dataclass(frozen=True)
class Outcome:
    """One request's times in seconds, ``start`` on a clock that all of a run share; ``error`` is empty on success."""

    adapter: str | None
    start: float
    ttft: float
    latency: float
    itl: tuple[float, ...]
    prompt_len: int
    output_len: int
    error: str


def make_requests(workload: Workload, adapters: Sequence[str], seed: int) -> list[Request]:
    """The requests of one run, the same for every system: prompts, lengths, arrivals, and who asks for which adapter.

    Raises:
        BDLoRAError: there are fewer adapters than the workload asks for.
    """
    if adapters and len(adapters) < workload.adapters:
        raise BDLoRAError(f"--adapters {workload.adapters}: found {len(adapters)} on the server, expected as many")
    rng = random.Random(seed)
    arrivals = [*workload.arrivals(rng)]
    shapes = workload.lengths(rng)
    chosen = workload.choose(rng)
    # Drawn for the base model, too: every system gets the same prompts.
    return [
        Request(
            rng.choices(_TOKENS, k=input_len),
            output_len,
            adapters[index % len(adapters)] if adapters else None,
            at,
        )
        for (input_len, output_len), index, at in zip(shapes, chosen, arrivals, strict=True)
    ]


def run_load(
    target: Target, requests: Sequence[Request], concurrency: int | None, server_runs: Callable[[], bool]
) -> list[Outcome]:
    """Warm up, send all requests, at most ``concurrency`` at a time, and wait for the answers.

    Raises:
        BDLoRAError: the server ended meanwhile; ``server_runs`` is asked all the time.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang warns of what is no GPU
        serving = importlib.import_module("sglang.benchmark.serving")
    serving.set_global_args(
        Namespace(
            disable_stream=False, disable_ignore_eos=False, temperature=0.0, top_p=1.0, return_logprob=False,
            top_logprobs_num=0, token_ids_logprob=None, logprob_start_len=-1, return_routed_experts=False,
            cache_report=False, header=None,
        )
    )  # fmt: skip
    return asyncio.run(_drive(serving, target, requests, concurrency, server_runs))


async def _drive(
    serving: Any, target: Target, requests: Sequence[Request], concurrency: int | None, server_runs: Callable[[], bool]
) -> list[Outcome]:
    warmups = [
        Request(request.prompt[::-1], min(request.output_len, _WARMUP_TOKENS), request.adapter)
        for request in islice(requests, min(concurrency or 1, _MOST_WARMUPS))
    ]
    work = asyncio.ensure_future(_send_all(serving, target, warmups, requests, concurrency))
    while not work.done():
        await asyncio.wait([work], timeout=_POLL_SECONDS)
        if not server_runs():
            work.cancel()
            with suppress(asyncio.CancelledError):
                await work
            raise BDLoRAError("the server ended during the run")
    return await work


async def _send_all(
    serving: Any, target: Target, warmups: Sequence[Request], requests: Sequence[Request], concurrency: int | None
) -> list[Outcome]:
    ask = serving.ASYNC_REQUEST_FUNCS[target.api]
    gate = asyncio.Semaphore(concurrency) if concurrency else None

    async def send(request: Request, begin: float) -> Outcome:
        if request.at is not None:
            await asyncio.sleep(max(0.0, begin + request.at - asyncio.get_running_loop().time()))
        async with gate or nullcontext():
            answer = await ask(_as_input(serving, target, request))
        error = "" if answer.success else (answer.error.strip().splitlines() or ["no reason given"])[-1][:300]
        return Outcome(
            request.adapter,
            answer.start_time,
            answer.ttft,
            answer.latency,
            tuple(answer.itl),
            len(request.prompt),
            answer.output_len if answer.success else 0,
            error,
        )

    await asyncio.gather(*(send(request, 0.0) for request in warmups))
    begin = asyncio.get_running_loop().time()
    return await asyncio.gather(*(send(request, begin) for request in requests))


def _as_input(serving: Any, target: Target, request: Request) -> Any:
    first = request.prompt[0] % len(_WORDS)
    words = islice(cycle(_WORDS), first, first + len(request.prompt))
    return serving.RequestFuncInput(
        prompt=" ".join(words) if target.text else request.prompt,
        api_url=target.url + _PATHS[target.api],
        prompt_len=len(request.prompt),
        output_len=request.output_len,
        model=target.model,
        lora_name=request.adapter,
        image_data=None,
        extra_request_body={},
    )
