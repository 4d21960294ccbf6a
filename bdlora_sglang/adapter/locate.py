"""From what a user writes (a folder, ``name=path``, a Hugging Face repo id) to named adapter folders."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from bdlora_sglang.adapter.adapter import Adapter
from bdlora_sglang.adapter.checkpoint import WEIGHTS_PATTERNS
from bdlora_sglang.adapter.config import CONFIG_NAME
from bdlora_sglang.errors import BDLoRAError

_REPO_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter as requests call it, and where it is: a folder or a Hugging Face repo id."""

    name: str
    path: str


def find_adapters(specs: Iterable[str]) -> list[NamedAdapter]:
    """Resolve what ``--adapters`` was given.

    Each spec is a folder with one adapter a subfolder, a single adapter folder, ``name=path``, or a repo id, whose last
    part becomes the name.

    Raises:
        BDLoRAError: nothing there, a name given twice, or a name that cannot be one.
    """
    adapters: dict[str, NamedAdapter] = {}
    for spec in specs:
        for adapter in _expand(spec):
            check_adapter_name(adapter.name)
            if adapter.name in adapters:
                raise BDLoRAError(
                    f"--adapters {spec}: adapter name '{adapter.name}': found it for "
                    f"'{adapters[adapter.name].path}' and '{adapter.path}', expected names that differ "
                    "(rename one with name=path)"
                )
            adapters[adapter.name] = adapter
    return list(adapters.values())


def open_adapters(specs: Iterable[str]) -> list[NamedAdapter]:
    """`find_adapters`, with each adapter's config and tensor shapes checked; raises `AdapterError` too."""
    named = find_adapters(specs)
    for adapter in named:
        Adapter.open(adapter_folder(adapter.path))
    return named


def _expand(spec: str) -> list[NamedAdapter]:
    folder = Path(spec)
    if folder.is_dir():
        if (folder / CONFIG_NAME).is_file():
            return [NamedAdapter(folder.resolve().name, spec)]
        inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not inner:
            raise BDLoRAError(f"--adapters {spec}: found no {CONFIG_NAME} and no subfolders, expected PEFT adapters")
        return [NamedAdapter(path.name, str(path)) for path in inner]
    name, separator, path = spec.partition("=")
    if separator:
        return [NamedAdapter(name, path)]
    if is_repo_id(spec):
        return [NamedAdapter(spec.rpartition("/")[2], spec)]
    raise BDLoRAError(
        f"--adapters {spec}: found no such folder, expected a folder, name=path or a Hugging Face repo id"
    )


def folders_of(adapters: Iterable[NamedAdapter]) -> tuple[str, ...]:
    """The folders in which ``adapters`` lie side by side; repo ids have none."""
    return tuple(sorted({str(Path(a.path).resolve().parent) for a in adapters if Path(a.path).is_dir()}))


def check_adapter_name(name: object) -> None:
    """Raise `BDLoRAError` unless ``name`` can name an adapter in SGLang's API, whose clients send it in JSON."""
    if not isinstance(name, str) or not 0 < len(name) <= 256 or name != name.strip() or not name.isprintable():
        raise BDLoRAError(
            f"adapter name: found {name!r}, expected 1 to 256 printable characters without white space around them"
        )


def is_repo_id(path: str) -> bool:
    """Whether ``path`` looks like a Hugging Face repo id."""
    return _REPO_ID.match(path) is not None


def adapter_folder(path: str) -> Path:
    """The local folder of an adapter; a repo id is downloaded (config and safetensors alone) or found in the cache."""
    folder = Path(path)
    if folder.exists() or not is_repo_id(path):
        return folder
    try:
        return Path(snapshot_download(path, allow_patterns=[CONFIG_NAME, *WEIGHTS_PATTERNS, "added_tokens.json"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BDLoRAError(
            f"adapter '{path}': found no such folder and no such repo ({reason}), expected one"
        ) from error
