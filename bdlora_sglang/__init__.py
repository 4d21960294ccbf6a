"""BD-LoRA (block-diagonal LoRA, arXiv 2510.23346) on unmodified SGLang.

`Engine` is SGLang's engine with BD-LoRA inside. It is imported when first used, so that `bdlora_sglang.adapter` works
without SGLang.
"""

from typing import TYPE_CHECKING, Any

from bdlora_sglang.errors import AdapterError, BDLoRAError

if TYPE_CHECKING:
    from bdlora_sglang.serving.engine import Engine

__version__ = "0.1.0"
__all__ = ["AdapterError", "BDLoRAError", "Engine", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from bdlora_sglang.serving.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
