"""The HTTP APIs that SGLang speaks: whose bodies name a model, and how each writes an error."""

from enum import Enum
from http import HTTPStatus
from typing import Any

from sglang.srt.entrypoints.anthropic.serving import ERROR_TYPE_MAP


class Family(Enum):
    """``NATIVE`` is SGLang's own, which names an adapter by ``lora_path`` and no model."""

    OPENAI = "openai"
    RESPONSES = "responses"
    ANTHROPIC = "anthropic"
    OLLAMA = "ollama"
    NATIVE = "native"

    @property
    def names_models(self) -> bool:
        return self is not Family.NATIVE

    def error(self, status: int, message: str, field: str | None) -> dict[str, Any]:
        """The body of an error."""
        if self is Family.ANTHROPIC:
            kind = ERROR_TYPE_MAP.get(status, "invalid_request_error")
            return {"type": "error", "error": {"type": kind, "message": message}}
        if self is Family.OLLAMA:
            return {"error": message}
        code: str | int = "model_not_found" if status == HTTPStatus.NOT_FOUND else status
        error = {"message": message, "type": "invalid_request_error", "param": field, "code": code}
        return {"error": error}


def family_of(path: str) -> Family:
    """The API that ``path`` belongs to."""
    if path.startswith("/v1/messages"):
        return Family.ANTHROPIC
    if path.startswith("/v1/responses"):
        return Family.RESPONSES
    if path.startswith("/api/"):
        return Family.OLLAMA
    # System One's models are names of its own.
    if path.startswith("/v1/") and not path.startswith("/v1/systemone"):
        return Family.OPENAI
    if path in ("/invocations", "/tokenize", "/detokenize"):
        return Family.OPENAI
    return Family.NATIVE
