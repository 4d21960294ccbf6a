"""The JSON files of an adapter, which come from anywhere."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bdlora_sglang.errors import AdapterError

# A config that names each expert of a large model in a pattern of its own has a tenth of it.
MOST_BYTES = 16 << 20


def read_json(path: Path, subject: str) -> Any:
    """The content of a JSON file of an adapter; raises `AdapterError` when it is too large or is none."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise AdapterError(str(path), subject, str(error), "a JSON object") from error
    if len(content) > MOST_BYTES:
        raise AdapterError(str(path), subject, f"more than {MOST_BYTES} bytes", "a JSON object")
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(str(path), subject, str(error), "a JSON object") from error


def checked_tokens(tokens: object, source: str) -> Mapping[str, int] | None:
    """What ``added_tokens.json`` holds, or stands for it; raises `AdapterError` unless it is ids by token."""
    if tokens is None:
        return None
    if not isinstance(tokens, Mapping) or not all(isinstance(number, int) for number in tokens.values()):
        raise AdapterError(source, "added tokens", type(tokens).__name__, "a JSON object of token ids")
    return tokens
