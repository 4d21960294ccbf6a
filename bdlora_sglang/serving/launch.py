"""From the words of ``bdlora launch`` to SGLang's server arguments."""

from collections.abc import Mapping, Sequence

from sglang.srt.server_args import ServerArgs, prepare_server_args

from bdlora_sglang.adapter.locate import NamedAdapter
from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.serving.engine import platform_defaults


def server_args(model_path: str, tp: int, adapters: Sequence[NamedAdapter], sglang_flags: Sequence[str]) -> ServerArgs:
    """SGLang's server arguments.

    Args:
        model_path: a path, repo id or URL, as `resolve_model` gives it.
        tp: tensor-parallel degree.
        adapters: those to load at start.
        sglang_flags: flags that SGLang reads itself, as they were typed.

    Raises:
        BDLoRAError: flags that contradict each other.
    """
    if adapters and "--lora-paths" in sglang_flags:
        raise BDLoRAError("--lora-paths: found both it and --adapters, expected one of them")
    defaults = platform_defaults(tp, _int_flag(sglang_flags, ("--dp-size", "--data-parallel-size", "--dp")))
    argv = ["--model-path", model_path, "--tp-size", str(tp), *sglang_flags]
    return prepare_server_args([*argv, *_missing_flags(defaults, sglang_flags), *_lora_flags(adapters)])


def _lora_flags(adapters: Sequence[NamedAdapter]) -> list[str]:
    if not adapters:
        return []
    return ["--enable-lora", "--lora-paths", *(f"{adapter.name}={adapter.path}" for adapter in adapters)]


def _missing_flags(defaults: Mapping[str, object], given: Sequence[str]) -> list[str]:
    """``defaults`` as flags, without those that the user has set."""
    flags: list[str] = []
    for name, value in defaults.items():
        flag = "--" + name.replace("_", "-")
        if not any(word == flag or word.startswith(f"{flag}=") for word in given):
            flags += [flag] if value is True else [flag, str(value)]
    return flags


def _int_flag(flags: Sequence[str], names: Sequence[str], default: int = 1) -> int:
    """The value of a flag that SGLang parses later and the platform must know now."""
    for word, following in zip(flags, [*flags[1:], ""], strict=False):
        name, separator, value = word.partition("=")
        if name in names:
            value = value if separator else following
            if value.isdigit():
                return int(value)
    return default
