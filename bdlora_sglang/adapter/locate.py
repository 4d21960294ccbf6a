"""From what a user writes (a folder, ``name=path``, a Hugging Face repo id) to named adapter folders."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

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


def _expand(spec: str) -> list[NamedAdapter]:
    folder = Path(spec)
    if folder.is_dir():
        if looks_like_adapter(folder):
            return [NamedAdapter(folder.resolve().name, spec)]
        inner = [child for child in _subfolders(folder) if _holds_adapter(child)]
        if not inner:
            raise BDLoRAError(
                f"--adapters {spec}: found no {CONFIG_NAME} and no subfolders with one, expected PEFT adapters"
            )
        return [NamedAdapter(path.name, str(path)) for path in inner]
    name, separator, path = spec.partition("=")
    if separator:
        return [NamedAdapter(name, path)]
    if is_repo_id(spec):
        return [NamedAdapter(spec.rpartition("/")[2], spec)]
    raise BDLoRAError(
        f"--adapters {spec}: found no such folder, expected a folder, name=path or a Hugging Face repo id"
    )


def looks_like_adapter(folder: Path) -> bool:
    """Whether there is a config or weights of an adapter; one of the two counts, so that its fault is reported."""
    return (folder / CONFIG_NAME).exists() or any(folder.glob("adapter_model.*"))


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _holds_adapter(folder: Path) -> bool:
    return looks_like_adapter(folder) or any(map(looks_like_adapter, _subfolders(folder)))


def _inside(folder: Path) -> Path:
    """``folder``, or the adapter in it, when it is the parent of just one (a trainer's only ``checkpoint-N``)."""
    if not folder.is_dir() or looks_like_adapter(folder):
        return folder
    # A link might lead out of the folders that clients may load from.
    inner = [path for path in _subfolders(folder) if looks_like_adapter(path) and not path.is_symlink()]
    if len(inner) > 1:
        raise BDLoRAError(
            f"{folder}: found the adapters {', '.join(path.name for path in inner)}, expected one: name it with "
            f"--adapters {folder.name}={inner[-1]}"
        )
    return inner[0] if inner else folder


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
    return not path.startswith(".") and _REPO_ID.match(path) is not None


def adapter_folder(path: str) -> Path:
    """The local folder of an adapter; a repo id is downloaded (config and safetensors alone) or found in the cache."""
    folder = Path(path)
    if folder.exists() or not is_repo_id(path):
        return _inside(folder)
    try:
        return Path(snapshot_download(path, allow_patterns=[CONFIG_NAME, *WEIGHTS_PATTERNS, "added_tokens.json"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BDLoRAError(
            f"adapter '{path}': found no such folder and no such repo ({reason}), expected one"
        ) from error
