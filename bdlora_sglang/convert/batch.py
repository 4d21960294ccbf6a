"""Many adapters side by side on the cores, each in a process of its own, so that a crash costs one adapter."""

import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from bdlora_sglang.adapter.checkpoint import WEIGHTS_NAME
from bdlora_sglang.adapter.locate import looks_like_adapter
from bdlora_sglang.convert.report import METADATA_KEY, ConversionReport
from bdlora_sglang.errors import BDLoRAError


class Outcome(Enum):
    CONVERTED = "converted"
    SKIPPED = "skipped"  # done before, with the same options
    FAILED = "failed"


@dataclass(frozen=True)
class Job:
    """One adapter: ``convert(source, destination, *arguments, progress=...)`` is called in a process of its own.

    ``convert`` is a picklable function, such as `lora2bd`; ``record`` is its `ConvertOptions.record`.
    """

    source: Path
    destination: Path
    convert: Callable[..., ConversionReport]
    arguments: tuple[Any, ...]
    operation: str
    record: dict[str, Any]
    force: bool = False


@dataclass(frozen=True)
class Result:
    job: Job
    outcome: Outcome
    report: ConversionReport | None = None
    message: str = ""


# Called with the job, the steps done and their total.
JobProgress = Callable[[Job, int, int], None]


def find_adapters(folder: Path) -> list[Path]:
    """The adapters right in ``folder``: its subfolders that have a config or weights of an adapter.

    Empty when ``folder`` is an adapter itself. A subfolder with one of the two counts, so that its fault is reported.
    """
    if not folder.is_dir() or looks_like_adapter(folder):
        return []
    return sorted(
        child
        for child in folder.iterdir()
        if child.is_dir() and not child.name.startswith(".") and looks_like_adapter(child)
    )


def convert_all(jobs: Sequence[Job], workers: int, progress: JobProgress | None = None) -> Iterator[Result]:
    """Run the jobs, ``workers`` at a time, and yield their results as they come.

    A destination that the same operation with the same options has made is skipped; a failure is a result too, and
    does not stop the others. Interrupted, it leaves finished adapters and nothing half done under their names; it can
    be run again.
    """
    waiting = list(reversed(jobs))
    running: dict[Connection, tuple[Job, ForkServerProcess]] = {}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "bdlora_sglang.convert"])
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop()
                if not job.force and is_done(job):
                    yield Result(job, Outcome.SKIPPED)
                else:
                    running.update([_start(context, job)])
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                job, process = running[connection]
                message = _receive(connection)
                if isinstance(message, tuple):
                    if progress is not None:
                        progress(job, *message)
                    continue
                process.join()
                del running[connection]
                connection.close()
                yield _result(job, process, message)
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()


def is_done(job: Job) -> bool:
    """Whether the destination is the finished result of this job, by its metadata."""
    try:
        with safe_open(job.destination / WEIGHTS_NAME, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    except (OSError, SafetensorError, ValueError):
        return False
    wanted = (job.operation, job.source.absolute().name, job.record)
    return (
        record.get("operation"),
        record.get("source"),
        record.get("options"),
    ) == wanted


def _start(context: ForkServerContext, job: Job) -> tuple[Connection, tuple[Job, ForkServerProcess]]:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job, sender))
    process.start()
    sender.close()
    return receiver, (job, process)


def _work(job: Job, sender: Connection) -> None:
    """In the job's process: send ``(done, total)`` as it goes, then the report or the message of its failure."""
    try:
        sender.send(
            job.convert(
                job.source,
                job.destination,
                *job.arguments,
                progress=lambda *step: sender.send(step),
            )
        )
    except (BDLoRAError, OSError) as error:
        sender.send(str(error))
    except BaseException as error:
        sender.send(f"{type(error).__name__}: {error}")
        raise


def _receive(connection: Connection) -> tuple[int, int] | ConversionReport | str | None:
    try:
        message: tuple[int, int] | ConversionReport | str = connection.recv()
    except EOFError:
        return None
    return message


def _result(job: Job, process: ForkServerProcess, message: object) -> Result:
    if isinstance(message, ConversionReport):
        return Result(job, Outcome.CONVERTED, message)
    if isinstance(message, str):
        return Result(job, Outcome.FAILED, message=message)
    return Result(
        job,
        Outcome.FAILED,
        message=f"its process ended with code {process.exitcode}, without a result",
    )
