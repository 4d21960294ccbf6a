"""Small random models and adapters for the demo, the tests and the benchmarks. The same arguments give the same bytes.

The sizes are chosen so that 1, 2, 3, 4 and 8 blocks divide every module, and TP 1, 2 and 4 the heads.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bdlora_perf.synthetic.tokenizer import BOS_ID, EOS_ID, VOCAB_SIZE, make_tokenizer, unprintable_tokens

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")
ALL_MODULES = ATTENTION_MODULES + MLP_MODULES

# Which factor is block-diagonal, by module: row-parallel layers A, column-parallel layers B.
BD_A_MODULES = ("o_proj", "down_proj")
BD_B_MODULES = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "qkv_proj", "gate_up_proj", "lm_head")

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
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(architecture, **{**_SHAPE, **_ARCHITECTURES[architecture], **overrides})
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config)
    _fill_weights(model, torch.Generator().manual_seed(seed), zero_centred_norms=architecture.startswith("gemma"))
    tokenizer = make_tokenizer()
    if printable:
        assert not config.tie_word_embeddings, "a row of the embedding is not to be zeroed"
        # A logit of zero never is the largest of hundreds of random ones.
        with torch.no_grad():
            model.get_output_embeddings().weight[unprintable_tokens(tokenizer)] = 0
    folder = Path(folder)
    with _no_progress_bar():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def _no_progress_bar() -> Iterator[None]:
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
    logit_std = _LOGIT_STD / math.sqrt(int(model.config.hidden_size))
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


def lora_config(rank: int, nblocks: int | None, target_modules: Sequence[str], **fields: Any) -> "LoraConfig":
    """PEFT's config of an adapter; ``nblocks`` makes it BD-LoRA, ``fields`` are PEFT's others."""
    from peft import BdLoraConfig, LoraConfig

    bdlora = None
    if nblocks is not None:
        bdlora = BdLoraConfig(
            target_modules_bd_a=[name for name in BD_A_MODULES if name in target_modules] or None,
            target_modules_bd_b=[name for name in BD_B_MODULES if name in target_modules] or None,
            nblocks=nblocks,
        )
    return LoraConfig(r=rank, target_modules=list(target_modules), use_bdlora=bdlora, task_type="CAUSAL_LM", **fields)


def make_adapter(
    folder: str | Path,
    model_folder: str | Path,
    *,
    rank: int = 8,
    nblocks: int | None = None,
    target_modules: Sequence[str] = ALL_MODULES,
    seed: int = 0,
    alpha: float | None = None,
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers_to_transform: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    scale: float = 0.5,
) -> Path:
    """Make a random adapter with PEFT itself, and return its folder.

    Args:
        folder: where PEFT's ``adapter_config.json`` and ``adapter_model.safetensors`` are written.
        model_folder: the base model; only its config is read.
        rank: the whole rank, all blocks together.
        nblocks: blocks of the block-diagonal factors; None makes a plain LoRA adapter.
        target_modules: the last parts of the names of the modules that get LoRA.
        seed: of the weights.
        alpha: ``lora_alpha``; twice the rank if None.
        use_rslora, rank_pattern, alpha_pattern, layers_to_transform: PEFT's fields.
        dtype: of the stored weights.
        scale: the standard deviation that the adapter adds to a module's output, for inputs of unit variance, whatever
            its rank, blocks and scaling. At the default it changes the tokens and leaves the logits as far apart.

    Raises:
        ValueError: PEFT refuses the arguments, for example blocks that do not divide a module.
    """
    from peft import get_peft_model, get_peft_model_state_dict
    from transformers import AutoConfig, AutoModelForCausalLM

    config = lora_config(
        rank,
        nblocks,
        target_modules,
        lora_alpha=2 * rank if alpha is None else alpha,  # PEFT takes any number
        use_rslora=use_rslora,
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
        layers_to_transform=None if layers_to_transform is None else list(layers_to_transform),
    )
    with torch.device("meta"):  # shapes are all that is needed of the base model, so its size does not matter
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder))
        model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for name, layer in sorted(model.named_modules()):
        factors = _factors(layer)
        if factors is None:
            continue
        a, b = (factor for _, factor in factors)
        # A's outputs have unit variance; B's sum as many of them as it has columns. An embedding looks A up.
        a_std = 1.0 if getattr(layer, "lora_embedding_A", None) else 1 / math.sqrt(a.shape[1])
        b_std = scale / (layer.scaling["default"] * math.sqrt(b.shape[1]))
        for (suffix, weight), std in zip(factors, (a_std, b_std), strict=True):
            values = std * torch.randn(weight.shape, generator=generator)
            weights[f"{name}.{suffix}"] = values.to(dtype)
    expected = get_peft_model_state_dict(model, state_dict=model.state_dict(), save_embedding_layers=False)
    assert len(weights) == len(expected), "every LoRA tensor is filled"
    folder = Path(folder)
    model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    settle_config(folder / "adapter_config.json", model_folder)
    return folder


def _factors(layer: torch.nn.Module) -> list[tuple[str, torch.Tensor]] | None:
    """PEFT's A and B of a linear module or an embedding, each with its name; None where there is no LoRA."""
    for name, suffix in (("lora_embedding_", ".default"), ("lora_", ".default.weight")):
        if getattr(layer, f"{name}A", None):
            factors = [(factor, getattr(layer, f"{name}{factor}")["default"]) for factor in "AB"]
            return [(f"{name}{factor}{suffix}", getattr(weight, "weight", weight)) for factor, weight in factors]
    return None


def settle_config(path: Path, model_folder: str | Path) -> None:
    """Sort what PEFT writes in the order of a set, which changes from process to process, and name the base model."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = os.fspath(model_folder)
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
