"""A request that the gate turns away."""

from http import HTTPStatus

from bdlora_sglang.errors import BDLoRAError


class RequestError(BDLoRAError):
    """A request that is not carried out. SGLang's endpoints answer with ``status_code`` and the message."""

    def __init__(
        self, field: str, found: object, expected: object, status_code: HTTPStatus = HTTPStatus.BAD_REQUEST
    ) -> None:
        super().__init__(f"{field}: found {shortened(found)}, expected {expected}")
        self.field = field
        self.status_code = int(status_code)


def shortened(value: object, limit: int = 120) -> str:
    """``value`` as a message shows it: strings and containers as Python writes them, cut where they are long."""
    text = repr(value) if isinstance(value, str | list | dict | tuple | set) else str(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
