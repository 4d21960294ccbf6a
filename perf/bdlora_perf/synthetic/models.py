"""Small random models for the demo, the tests and the benchmarks. The same arguments give the same bytes.

The sizes are chosen so that 1, 2, 3, 4 and 8 blocks divide every module, and TP 1, 2 and 4 the heads.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bdlora_perf.synthetic.tokenizer import (
    BOS_ID,
    EOS_ID,
    VOCAB_SIZE,
    make_tokenizer,
    make_word_tokenizer,
    unprintable_tokens,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 24,
    "num_key_value_heads": 12,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": EOS_ID,
}

# SGLang derives the head size of Qwen2 and Mixtral from the hidden size, so the two must agree. Its Gemma computes GeLU
# exactly whatever the config says, and transformers takes "gelu" for the tanh approximation: "gelu_python" is exact in
# both.
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"hidden_size": 192, "use_sliding_window": False},
    "qwen3": {"use_sliding_window": False},
    "mistral": {"sliding_window": None},
    "gemma": {"tie_word_embeddings": True, "hidden_act": "gelu_python"},
    "phi3": {"sliding_window": None},
    "gemma2": {"tie_word_embeddings": True, "query_pre_attn_scalar": 8, "sliding_window": 2048},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
    "mixtral": {"hidden_size": 192, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_5_vl": {
        "hidden_size": 192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    },
}
# Of models that see, whose language model has the shape above.
_VISION: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "out_hidden_size": 192,
        "fullatt_block_indexes": [1],
    },
}
# Fields of their configs, and the tokens that they name.
_VISION_TOKENS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
ARCHITECTURES = tuple(_ARCHITECTURES)

# Standard deviations, for inputs of unit variance. The layers must weigh more than the embedding they are added to, or
# the model repeats its last token, most of all where the embedding also makes the logits. The logits must spread, or
# the two largest are too close for greedy decoding to be the same in two engines that round differently.
_LOGIT_STD = 3.0
_RESIDUAL_GAIN = 3.0
_TIED_RESIDUAL_GAIN = 48.0
_BIAS_STD = 0.2
_NORM_STD = 0.1


def make_model(
    folder: str | Path, architecture: str = "llama", *, seed: int = 0, printable: bool = False, **overrides: Any
) -> Path:
    """Make a random float32 causal language model with a tokenizer, and return its folder.

    Args:
        folder: where it is written, in Hugging Face's layout; made if need be.
        architecture: one of `ARCHITECTURES`: "qwen2" has biases on q, k and v, "qwen3" norms on q and k, "gemma" tied
            embeddings and GeLU.
        seed: of the weights.
        printable: never generate a token without a text of its own (half of a character, a special token), so that
            every token of a streamed answer arrives as text; for untied embeddings.
        **overrides: fields of the model's config, such as ``intermediate_size=480`` (which SGLang pads at TP 2).

    Raises:
        ValueError: the architecture is not one of `ARCHITECTURES`.
    """
    if architecture not in _ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r}: expected one of {', '.join(ARCHITECTURES)}")
    from transformers import AutoConfig

    shape = {**_SHAPE, **_ARCHITECTURES[architecture], **overrides}
    tokenizer = make_tokenizer()
    if vision := _VISION.get(architecture):
        tokenizer.add_special_tokens({"additional_special_tokens": list(_VISION_TOKENS.values())})
        tokens = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _VISION_TOKENS.items()}
        tied, shape["vocab_size"] = shape["tie_word_embeddings"], len(tokenizer)
        shape = {"text_config": shape, "vision_config": vision, "tie_word_embeddings": tied, **tokens}
    config = AutoConfig.for_model(architecture, **shape)
    config.dtype = torch.float32
    model = model_class(config).from_config(config)
    _fill_weights(model, torch.Generator().manual_seed(seed), zero_centred_norms=architecture.startswith("gemma"))
    if printable:
        assert not config.tie_word_embeddings, "a row of the embedding is not to be zeroed"
        # A logit of zero never is the largest of hundreds of random ones.
        with torch.no_grad():
            model.get_output_embeddings().weight[unprintable_tokens(tokenizer)] = 0
    folder = Path(folder)
    with no_progress_bar():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if vision:
        _save_image_processor(folder)
    return folder


def model_class(config: Any) -> Any:
    """The class of transformers that makes the model with all its towers."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


def _save_image_processor(folder: Path) -> None:
    from transformers import AutoTokenizer, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    images = Qwen2VLImageProcessor(min_pixels=4 * 28**2, max_pixels=16 * 28**2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor()).save_pretrained(folder)


def make_model_without_weights(folder: str | Path, **fields: Any) -> Path:
    """The config of a Llama and a tokenizer of words, for servers that fill in weights (``--load-format dummy``).

    Args:
        folder: where it is written; made if need be.
        **fields: of the config.
    """
    from transformers import LlamaConfig

    config = LlamaConfig(**{**_SHAPE, **fields}, architectures=["LlamaForCausalLM"])
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    make_word_tokenizer(config.vocab_size).save_pretrained(folder)
    return Path(folder)


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """transformers shows none inside."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _fill_weights(model: "PreTrainedModel", generator: torch.Generator, zero_centred_norms: bool) -> None:
    tied = bool(model.config.tie_word_embeddings)
    logit_std = _LOGIT_STD / math.sqrt(int(model.config.get_text_config().hidden_size))
    residual_gain = _TIED_RESIDUAL_GAIN if tied else _RESIDUAL_GAIN
    for name, weight in sorted(model.named_parameters()):
        mean = 0.0
        if name.endswith("norm.weight"):
            mean, std = 0.0 if zero_centred_norms else 1.0, _NORM_STD
        elif name.endswith(".bias"):
            std = _BIAS_STD
        elif name.endswith("embed_tokens.weight"):
            std = logit_std if tied else 1.0
        elif name.endswith("lm_head.weight"):
            std = logit_std
        else:
            gain = residual_gain if name.removesuffix(".weight").endswith(("o_proj", "down_proj")) else 1.0
            std = gain / math.sqrt(weight.shape[-1])
        with torch.no_grad():
            weight.copy_(mean + std * torch.randn(weight.shape, generator=generator))
