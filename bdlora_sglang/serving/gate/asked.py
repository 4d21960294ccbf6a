"""What the ``model`` of the HTTP request asked for that this task is about."""

from contextvars import ContextVar, Token
from dataclasses import dataclass


@dataclass(frozen=True)
class Asked:
    """``lora_path`` as SGLang's native API has it: an adapter's name, one for each prompt, or None for the base."""

    lora_path: str | list[str | None] | None


_asked: ContextVar[Asked | None] = ContextVar("asked", default=None)


def asked_adapter() -> Asked | None:
    """None outside of an HTTP request that has a ``model``."""
    return _asked.get()


def ask(asked: Asked | None) -> Token[Asked | None]:
    """Note it for this task and those that it starts. Each HTTP request is a task of its own."""
    return _asked.set(asked)
