"""Models and adapters for a benchmark, made on the fly and kept in the work folder under a name that says all of it."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from bdlora_perf.estimate.model_shape import ModelShape
from bdlora_perf.serve.systems import AdapterShape
from bdlora_perf.synthetic import make_adapter, make_model
from bdlora_perf.synthetic.models import make_model_without_weights
from bdlora_sglang.errors import BDLoRAError

# Attention kernels want heads of 64 at least; eight KV heads can be split up to TP 8.
_HEAD_DIM = 64
_KV_HEADS = 8
_HIDDEN_STEP = _HEAD_DIM * _KV_HEADS
_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class MadeAdapter:
    """An adapter on disk: numbers of one adapter, ``num_bytes`` those of its weight file."""

    shape: AdapterShape
    folder: Path
    parameters: int
    num_bytes: int


def synthetic_model(work: Path, hidden_size: int, num_layers: int, seed: int) -> Path:
    """A random Llama with the proportions of Llama-3.1-8B and heads of 64.

    Raises:
        BDLoRAError: the hidden size does not fit the heads, or the model cannot be written.
    """
    if hidden_size <= 0 or hidden_size % _HIDDEN_STEP:
        raise BDLoRAError(f"--hidden-size: found {hidden_size}, expected a multiple of {_HIDDEN_STEP}")

    def make(folder: Path) -> None:
        make_model(
            folder,
            seed=seed,
            printable=True,
            hidden_size=hidden_size,
            intermediate_size=hidden_size * 7 // 2,
            num_hidden_layers=num_layers,
            num_attention_heads=hidden_size // _HEAD_DIM,
            num_key_value_heads=_KV_HEADS,
            head_dim=_HEAD_DIM,
            max_position_embeddings=8192,
        )

    return _make_once(work / "models" / f"llama-h{hidden_size}-l{num_layers}-s{seed}", make)


def one_rank_model(work: Path, shape: ModelShape, tp: int) -> Path:
    """One of ``tp`` ranks of a model as a model of its own, without weights (``--load-format dummy``).

    Raises:
        BDLoRAError: the model cannot be cut so, or the folder cannot be written.
    """
    own = shape.one_rank_of(tp)

    def make(folder: Path) -> None:
        make_model_without_weights(
            folder,
            vocab_size=own.vocabulary,
            hidden_size=own.hidden,
            intermediate_size=own.intermediate,
            num_hidden_layers=own.layers,
            num_attention_heads=own.heads,
            num_key_value_heads=own.kv_heads,
            head_dim=own.head_dim,
            max_position_embeddings=131072,
            tie_word_embeddings=own.tied,
        )

    return _make_once(work / "models" / f"{own.name}-one-rank-of-{tp}", make)


def matched_adapter(work: Path, model: str, shape: AdapterShape, seed: int) -> MadeAdapter:
    """A random bfloat16 adapter of ``shape`` on all seven linear modules of ``model`` (a folder or repo id).

    Raises:
        BDLoRAError: the blocks do not divide a module, or the adapter cannot be written.
    """
    kind = "lora" if shape.nblocks is None else f"bd{shape.nblocks}"
    name = f"{_fingerprint(model)}-{kind}-r{shape.rank}-s{seed}"

    def make(folder: Path) -> None:
        try:
            make_adapter(folder, model, rank=shape.rank, nblocks=shape.nblocks, seed=seed, dtype=torch.bfloat16)
        except ValueError as error:
            raise BDLoRAError(f"--tp: found a model that {shape.nblocks} blocks do not fit ({error})") from error

    folder = _make_once(work / "adapters" / name, make)
    weights = folder / _WEIGHTS
    return MadeAdapter(shape, folder, _count_parameters(weights), weights.stat().st_size)


def adapter_names_of(count: int) -> list[str]:
    """What that many adapters are called."""
    return [f"adapter-{i}" for i in range(count)]


def adapter_flags(adapter: MadeAdapter, count: int, slots: int) -> list[str]:
    """``--adapters`` for ``count`` adapters, and ``slots`` for them.

    They share one folder: the time a server takes does not depend on the values, and it holds every name in a slot of
    its own.
    """
    flags = [word for name in adapter_names_of(count) for word in ("--adapters", f"{name}={adapter.folder}")]
    return [*flags, "--max-loras-per-batch", str(slots)]


def _count_parameters(weights: Path) -> int:
    try:
        with safe_open(weights, framework="pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise BDLoRAError(
            f"{weights}: found {error}, expected an adapter (delete its folder to make it anew)"
        ) from error


def _fingerprint(model: str) -> str:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).to_dict()
    config.pop("_name_or_path", None)
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """``folder``, which ``make`` fills under another name if it is not there yet."""
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        make(temporary)
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise BDLoRAError(f"{folder}: found {error}, expected to be able to write it") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
