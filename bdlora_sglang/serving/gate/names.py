"""Which model a client means: ``model`` in OpenAI's, Anthropic's and Ollama's APIs."""

from collections.abc import Callable, Collection, Iterable
from http import HTTPStatus

from sglang.srt.entrypoints.openai.protocol import DEFAULT_MODEL_NAME
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.server_args import ServerArgs

from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.serving.gate.errors import RequestError

# SGLang's protocol fills in the first where a request names no model; the second is what our documents write.
_ALWAYS_THE_BASE = (DEFAULT_MODEL_NAME, "base")


def base_names(model_path: str, served_model_name: str | None, aliases: Iterable[str] = ()) -> frozenset[str]:
    """Every name of the base model."""
    return frozenset(filter(None, (*_ALWAYS_THE_BASE, model_path, served_model_name, *aliases)))


def check_not_the_base(name: str, bases: Collection[str]) -> None:
    """Raise `BDLoRAError` for an adapter name that already means something else."""
    if name in bases or name.startswith(tuple(f"{base}:" for base in bases)):
        raise BDLoRAError(
            f"adapter name: found {name!r}, expected one that is not the base model's: "
            f"{', '.join(sorted(bases))}, alone or before a colon"
        )


def check_names_at_start(server_args: ServerArgs, aliases: Iterable[str] = ()) -> None:
    """`check_not_the_base` for the adapters of ``--lora-paths``, before any process starts."""
    bases = base_names(server_args.model_path, server_args.served_model_name, aliases)
    for entry in server_args.lora_paths or ():
        check_not_the_base(_name(entry), bases)


def _name(entry: str | dict[str, str] | LoRARef) -> str:
    """As SGLang reads an entry of ``lora_paths``: ``name=path``, a path, or either as fields."""
    if isinstance(entry, dict):
        return entry["lora_name"]
    return str(entry.lora_name) if isinstance(entry, LoRARef) else entry.partition("=")[0]


class ModelNames:
    """Resolves names against the base model's and those of the adapters that are there at the moment.

    Args:
        served: gives the base model's name in answers; a weight update may change it, and those that follow.
        bases: gives all names of the base model.
        adapters: gives the names of all adapters that a request may ask for.
        allow_unknown: whether a name that means nothing stands for the base model, as in SGLang.
    """

    def __init__(
        self,
        served: Callable[[], str],
        bases: Callable[[], Collection[str]],
        adapters: Callable[[], Collection[str]],
        allow_unknown: bool = False,
    ) -> None:
        self.served = served
        self._bases, self._adapters, self._allow_unknown = bases, adapters, allow_unknown

    def listed(self) -> set[str]:
        """The names that ``/v1/models`` lists."""
        return {self.served(), *self._adapters()}

    def adapter(self, model: str) -> str | None:
        """The adapter that ``model`` names: by itself or as ``base:adapter``. None for the base model.

        Raises:
            RequestError: 404, it names neither.
        """
        adapters, bases = self._adapters(), self._bases()
        if model in adapters:
            return model
        if model in bases:
            return None
        for base in bases:
            if model.startswith(f"{base}:") and (adapter := model[len(base) + 1 :].strip()) in adapters:
                return adapter
        if self._allow_unknown:
            return None
        raise RequestError(
            "model", model, "the base model or a loaded adapter, as /v1/models lists them", HTTPStatus.NOT_FOUND
        )

    def check_adapters(self, lora_path: object) -> None:
        """Raise `RequestError` (404) when ``lora_path``, one name or one for each prompt, names an unknown adapter."""
        adapters = self._adapters()
        for name in lora_path if isinstance(lora_path, list) else [lora_path]:
            if isinstance(name, str) and name and name not in adapters:
                raise RequestError(
                    "lora_path", name, "a loaded adapter, as /v1/models lists them", HTTPStatus.NOT_FOUND
                )
