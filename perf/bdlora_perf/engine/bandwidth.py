"""Memory bandwidth: what a decode step needs at least, and what the machine has."""

import os
import time
from pathlib import Path

import torch

from bdlora_perf.estimate.model_shape import SHAPES, ModelShape, load_shape

# Of the types that a base model is served in.
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# More than any cache holds.
_COPY_BYTES = 2**29
_REPETITIONS = 7


def shape_of(model: str) -> ModelShape:
    """The shape of a model folder, or of a repo id that can be reached or is in the cache.

    Raises:
        BDLoRAError: not the config of a dense decoder.
    """
    if not Path(model).exists() and model.lower() not in SHAPES:
        from huggingface_hub import hf_hub_download

        model = hf_hub_download(model, "config.json")
    return load_shape(model)


def step_bytes(shape: ModelShape, tp: int, item_bytes: int) -> float:
    """Bytes of weights that all ``tp`` ranks together read in a decode step, each its own shard once.

    These are the linear layers (with the KV heads that ranks hold copies of) and the vocabulary projection. Left out is
    what is small beside them: looked-up rows of the embedding, norms, biases, the KV cache, adapters.
    """
    linears = sum(linear.inputs * linear.outputs * linear.shard for linear in shape.linears(tp))
    return (shape.layers * linears * tp + shape.vocabulary * shape.hidden) * item_bytes


def copy_bandwidths() -> dict[str, float]:
    """GB/s (1e9 bytes, read and written) of copying a large tensor, the best of some, by what copied it."""
    if torch.accelerator.is_available():
        return {"one GPU": _copy_bandwidth(str(torch.accelerator.current_accelerator()))}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    found = {}
    try:
        for count in dict.fromkeys((1, cores)):
            torch.set_num_threads(count)
            found["one core" if count == 1 else f"all {count} cores"] = _copy_bandwidth("cpu")
    finally:
        torch.set_num_threads(threads)
    return found


def _copy_bandwidth(device: str) -> float:
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device).view(torch.float32)
    target = torch.zeros_like(source)
    times = []
    for _ in range(_REPETITIONS):
        _synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * _COPY_BYTES / min(times) / 1e9


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()
