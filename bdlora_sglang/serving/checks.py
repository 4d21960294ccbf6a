"""What cannot be served, found before any process starts: features, TP degrees that do not fit, grammar backends."""

import json
import logging
import socket
import traceback
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from msgspec.structs import fields
from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.hf_transformers.common import get_hf_text_config
from sglang.srt.utils.hf_transformers.config import get_config

from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.serving.backend import BACKEND_NAME
from bdlora_sglang.serving.feature import check_features
from bdlora_sglang.serving.features import FEATURES
from bdlora_sglang.serving.hardware import on_cpu_platform

logger = logging.getLogger(__name__)

# By its presence a config has experts, whose intermediate size SGLang splits in ways of its own (``--ep-size``).
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")

# llguidance reads JSON schemas to the letter: SGLang's schema of a tool that a request names does not say that a call
# is an object, so any number or list passes. It also ignores that "required" asks for one call at least.
_CPU_GRAMMAR_BACKENDS = ("xgrammar", "outlines", "none")


@dataclass(frozen=True)
class ModelSizes:
    """What tensor parallelism splits of a model, whole. ``intermediate_size`` is None where nothing checks it."""

    heads: int
    kv_heads: int
    intermediate_size: int | None = None

    def allows(self, tp: int) -> bool:
        """Whether SGLang's layers can be split over ``tp`` ranks, as on a GPU (``srt/layers/linear.py``)."""
        return self._heads_split(tp) and self._kv_heads_split(tp) and self._intermediate_splits(tp)

    def _heads_split(self, tp: int) -> bool:
        return self.heads % tp == 0

    def _kv_heads_split(self, tp: int) -> bool:
        # With fewer KV heads than ranks, each head is on several ranks.
        return self.kv_heads % tp == 0 or tp % self.kv_heads == 0

    def _intermediate_splits(self, tp: int) -> bool:
        return self.intermediate_size is None or self.intermediate_size % tp == 0

    def expected(self, tp: int) -> str:
        """What a degree must be that ``tp`` is not, in words."""
        if not self._heads_split(tp):
            return f"a divisor of the model's {self.heads} attention heads ({self.kv_heads} KV heads)"
        if not self._kv_heads_split(tp):
            return f"a divisor or a multiple of the model's {self.kv_heads} KV heads ({self.heads} attention heads)"
        return f"a divisor of the model's intermediate size {self.intermediate_size} ({self.heads} attention heads)"


def check_address(host: str, port: int) -> None:
    """Raise `BDLoRAError` unless a server can listen there.

    SGLang would find that out after it has loaded the model, and take another server's answers there for its own.
    """
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        found = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
        raise BDLoRAError(f"--host {host} --port {port}: found '{found}', expected an address to listen at") from error


def check_tp(tp: int, sizes: ModelSizes) -> None:
    """Raise `BDLoRAError` with the degrees that are possible unless the model can be split over ``tp`` ranks."""
    if sizes.allows(tp):
        return
    *most, last = [str(degree) for degree in range(1, sizes.heads + 1) if sizes.allows(degree)]
    degrees = f"{', '.join(most)} or {last}" if most else last
    raise BDLoRAError(f"--tp: found {tp}, expected {sizes.expected(tp)}: {degrees}")


def model_sizes(hf_config: Any) -> ModelSizes | None:
    """Sizes of the language model in a transformers config, multimodal or not; None where it has no attention heads."""
    config = get_hf_text_config(hf_config)
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or heads < 1:
        return None
    kv_heads = getattr(config, "num_key_value_heads", None)
    dense = all(getattr(config, name, None) is None for name in _EXPERTS)
    intermediate_size = getattr(config, "intermediate_size", None) if dense else None
    return ModelSizes(
        heads,
        kv_heads if isinstance(kv_heads, int) and kv_heads > 0 else heads,
        intermediate_size if isinstance(intermediate_size, int) else None,
    )


def _hf_config(server_args: ServerArgs) -> Any:
    """The model's config, of which SGLang keeps its own; None where SGLang will say why, or finds the model elsewhere.

    Before SGLang resolves the arguments: on a CPU it then pads the heads in the config that it keeps.
    """
    try:
        config = get_config(
            server_args.model_path,
            trust_remote_code=server_args.trust_remote_code,
            revision=server_args.revision,
            model_override_args=json.loads(server_args.json_model_override_args),
        )
    except (OSError, ValueError):
        return None
    # Finding the language model in it changes it.
    return deepcopy(config)


def check_model(tp: int, hf_config: Any) -> None:
    """Raise `BDLoRAError` when the model cannot be split over ``tp`` ranks, by its config."""
    if tp > 1 and (sizes := model_sizes(hf_config)) is not None:
        check_tp(tp, sizes)


def cpu_dtype(given: str, hf_config: Any) -> str:
    """``--dtype`` on the CPU platform: what was given, but float32 for a model of that type by default.

    SGLang would make float16 of it, as is usual on a GPU. Here attention and norms have no loops for that.
    """
    own = getattr(get_hf_text_config(hf_config), "dtype", None)
    return "float32" if given == "auto" and own in (None, "float32", torch.float32) else given


def check_grammar_backend(name: str | None) -> None:
    """Raise `BDLoRAError` for a ``--grammar-backend`` that does not keep to its grammars on the CPU platform.

    None stands for SGLang's default, xgrammar.
    """
    if name is None or name in _CPU_GRAMMAR_BACKENDS:
        return
    *most, last = _CPU_GRAMMAR_BACKENDS
    raise BDLoRAError(
        f"--grammar-backend: found '{name}', expected {', '.join(most)} or {last} on the CPU: with others, a tool that "
        "a request names may be called with anything"
    )


def resolve(server_args: ServerArgs) -> None:
    """Resolve the arguments with BD-LoRA's backend among them, so that SGLang's own checks judge that one.

    Raises:
        BDLoRAError: a LoRA backend of SGLang's is asked for, a TP degree that does not fit the model, or SGLang refuses
            the arguments.
    """
    if server_args.lora_backend not in (BACKEND_NAME, _default("lora_backend")):
        raise foreign_lora_backend(server_args.lora_backend)
    decided = {"lora_backend": BACKEND_NAME}
    try:
        if (hf_config := _hf_config(server_args)) is not None:
            check_model(server_args.tp_size, hf_config)
            if on_cpu_platform():
                decided["dtype"] = cpu_dtype(server_args.dtype, hf_config)
        # What SGLang has for launchers that decide something before it does.
        declare_resolution(server_args, "bdlora_sglang", **decided)
        server_args.resolve_once()
    except BDLoRAError:
        raise
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:
        # An assertion may say nothing but its own line.
        reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise BDLoRAError(f"SGLang refuses its arguments: {reason}") from error


def foreign_lora_backend(found: object) -> BDLoRAError:
    return BDLoRAError(
        f"--lora-backend: found '{found}', expected none: BD-LoRA brings its own; --lora-sharding sglang takes one"
    )


def check_server_args(server_args: ServerArgs) -> None:
    """Raise `BDLoRAError` for what these arguments ask for and no server of ours gives.

    Args:
        server_args: after `resolve`; only what was resolved is looked at, however it was given.
    """
    resolved = resolving_view(server_args)
    check_features(FEATURES, resolved, asks_for_lora(server_args), on_cpu_platform())
    if on_cpu_platform():
        model_config = model_config_of(server_args)
        check_quantization(model_config.quantization)
        check_grammar_backend(resolved.grammar_backend)
        if model_config.dtype == torch.float16:
            logger.warning(
                "--dtype: found float16 (given, or the model's own), for which the CPU platform has no loops of its "
                "own: bfloat16 takes as much memory and less time, float32 twice the memory"
            )


def asks_for_lora(server_args: ServerArgs) -> bool:
    """Whether adapters are to be served. Asked of what was given: SGLang resolves LoRA away for some features."""
    return bool(server_args.enable_lora or (server_args.enable_lora is None and server_args.lora_paths))


def check_quantization(found: str | None) -> None:
    """Raise `BDLoRAError` for a quantised base model, by a flag or by its own config: the CPU has no kernels."""
    if found is not None:
        raise BDLoRAError(
            f"--quantization: found '{found}' (given, or in the model's config.json), expected none on the CPU: "
            "quantised models run on SGLang's GPU kernels"
        )


def _default(name: str) -> object:
    return next(field.default for field in fields(ServerArgs) if field.name == name)
