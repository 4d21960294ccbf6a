"""``--config FILE``: a YAML file of flags, BD-LoRA's own and SGLang's."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
import yaml

from bdlora_sglang.errors import BDLoRAError

_REST = "sglang_config"


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """A Typer callback: the file's values become defaults of the command's own options, the rest is SGLang's to read.

    Raises:
        BDLoRAError: the file cannot be read, or is no mapping.
    """
    if path is None:
        return None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BDLoRAError(f"--config {path}: found {error}, expected a YAML file of flags") from error
    if not isinstance(content, dict):
        raise BDLoRAError(f"--config {path}: found a {type(content).__name__}, expected a mapping of flags to values")
    own = {_key(name): option for option in context.command.params for name in option.opts}
    defaults: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, value in content.items():
        option = own.get(_key(str(name)))
        if option is None or option.name is None:
            rest[name] = value
        else:
            defaults[option.name] = [value] if option.multiple and not isinstance(value, list) else value
    context.default_map = {**(context.default_map or {}), **defaults}
    context.meta[_REST] = rest
    return path


@contextmanager
def sglang_flags(context: typer.Context) -> Iterator[list[str]]:
    """What is left for SGLang's parser: the words that are no option of ours, and a file with what else was in ours."""
    rest = context.meta.get(_REST)
    if not rest:
        yield context.args
        return
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", prefix="bdlora-") as file:
        yaml.safe_dump(rest, file)
        file.flush()
        yield ["--config", file.name, *context.args]


def _key(name: str) -> str:
    return name.lstrip("-").replace("-", "_")
