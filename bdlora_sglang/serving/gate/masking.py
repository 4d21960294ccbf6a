"""Keys of the server in what it tells: its facts, its log."""

import logging
from collections.abc import Collection
from typing import Any

from sglang.srt.server_args import ServerArgs

_SECRET_ARGS = ("api_key", "admin_api_key", "ssl_keyfile_password")
_MASK = "********"


def secrets_of(server_args: ServerArgs) -> tuple[str, ...]:
    """The values of the arguments that nobody but the operator may know."""
    return tuple(value for name in _SECRET_ARGS if (value := getattr(server_args, name, None)))


def masked(value: Any, secrets: Collection[str]) -> Any:
    """``value`` with every secret in its strings replaced."""
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, _MASK)
        return value
    if isinstance(value, dict):
        return {key: masked(item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item, secrets) for item in value]
    return value


def mask_log(secrets: Collection[str]) -> None:
    """Replace ``secrets`` in everything that this process logs from now on."""
    if not secrets:
        return
    make = logging.getLogRecordFactory()

    def make_masked(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        text = record.getMessage()
        if any(secret in text for secret in secrets):
            record.msg, record.args = masked(text, secrets), None
        return record

    logging.setLogRecordFactory(make_masked)
