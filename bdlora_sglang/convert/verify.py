"""How far two adapters are apart: the deltas of every module, and on request the base model's answers with each."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bdlora_sglang.adapter import Adapter, LoRAModule
from bdlora_sglang.convert.blocks import Block, open_convertible, read_blocks, regroup
from bdlora_sglang.convert.calibrate import load_model
from bdlora_sglang.errors import AdapterError, BDLoRAError


@dataclass(frozen=True)
class DeltaDifference:
    """``frobenius`` and ``spectral`` are norms of ``delta_a - delta_b`` over those of ``delta_a``, scaling included.

    A module that one adapter lacks has a delta of zero there.
    """

    module: str
    frobenius: float
    spectral: float


@dataclass(frozen=True)
class LogprobDifference:
    """Log probabilities of all tokens after every position of a prompt, with adapter a against b, in nats."""

    tokens: int
    largest: float
    mean_kl: float
    same_argmax: float


def compare_deltas(
    a: str | Path,
    b: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Iterator[DeltaDifference]:
    """The difference of every module's delta, in the order of the names, from thin factors (never the dense delta).

    ``delta_a - delta_b`` is the product of ``[s_a B_a, -s_b B_b]`` and ``[A_a; A_b]``; two QRs leave a matrix of the
    summed rank with the same singular values. One module is in memory at a time.

    Args:
        a: folder of the adapter that the errors are relative to.
        b: folder of the other one; LoRA or BD-LoRA of any block count, as the first.
        device: where the decompositions run.
        dtype: of the decompositions; float64 tells float32 factors apart to the last bit.

    Raises:
        AdapterError: an adapter cannot be used, or a module has other features in the two.
    """
    adapters = open_convertible(a), open_convertible(b)
    for name in sorted({*adapters[0].modules, *adapters[1].modules}):
        modules = [adapter.modules.get(name) for adapter in adapters]
        _check_same_features(adapters[1], *modules)
        thin = [
            None if module is None else _thin(adapter, module, torch.device(device), dtype)
            for adapter, module in zip(adapters, modules, strict=True)
        ]
        yield _difference(name, *thin)


def _check_same_features(adapter: Adapter, a: LoRAModule | None, b: LoRAModule | None) -> None:
    if a is None or b is None:
        return
    found, expected = (b.out_features, b.in_features), (a.out_features, a.in_features)
    if found != expected:
        raise AdapterError(adapter.checkpoint.source, f"module '{a.name}' (out, in)", found, expected)


def _thin(adapter: Adapter, module: LoRAModule, device: torch.device, dtype: torch.dtype) -> Block:
    """The whole delta as one block, scaling in B."""
    (block,) = regroup(read_blocks(adapter, module), module.side, 1)
    return Block(block.b.to(device, dtype) * module.scaling, block.a.to(device, dtype))


def _difference(name: str, a: Block | None, b: Block | None) -> DeltaDifference:
    if a is None or b is None:
        return DeltaDifference(name, *((1.0, 1.0) if b is None else (math.inf, math.inf)))
    norms = _singular_values(a)
    if a.b.shape == b.b.shape and torch.equal(a.b, b.b) and torch.equal(a.a, b.a):
        return DeltaDifference(name, 0.0, 0.0)
    missing = _singular_values(Block(torch.cat([a.b, -b.b], dim=1), torch.cat([a.a, b.a])))
    return DeltaDifference(
        name,
        _relative(torch.linalg.vector_norm(missing), torch.linalg.vector_norm(norms)),
        _relative(missing[0], norms[0]),
    )


def _relative(error: torch.Tensor, norm: torch.Tensor) -> float:
    if norm == 0:
        return 0.0 if error == 0 else math.inf
    return float(error / norm)


def _singular_values(block: Block) -> torch.Tensor:
    r_b, r_a = (
        torch.linalg.qr(block.b, mode="r").R,
        torch.linalg.qr(block.a.T, mode="r").R,
    )
    values: torch.Tensor = torch.linalg.svdvals(r_b @ r_a.T)
    return values


def compare_logprobs(a: str | Path, b: str | Path, model: str, prompt: str, device: str = "cpu") -> LogprobDifference:
    """Run the base model over a prompt with each adapter, by transformers and PEFT, and compare all log probabilities.

    Args:
        a: folder of the first adapter.
        b: folder of the other.
        model: folder or hub name of the base model; it is loaded once.
        prompt: text of at least one token.
        device: where the model runs.

    Raises:
        BDLoRAError: transformers or PEFT is missing, the model cannot be loaded, or the prompt is empty.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise BDLoRAError("--model: found no peft, expected it installed (pip install peft)") from error
    tokenizer, base = load_model(model, torch.device(device))
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
    if not ids.numel():
        raise BDLoRAError("--prompt: found no tokens, expected a text")
    peft_model = PeftModel.from_pretrained(base, str(a), adapter_name="a")
    peft_model.load_adapter(str(b), adapter_name="b")
    logprobs = []
    for adapter in ("a", "b"):
        peft_model.set_adapter(adapter)
        with torch.inference_mode():
            logprobs.append(peft_model(input_ids=ids).logits[0].double().log_softmax(-1))
    first, second = logprobs
    return LogprobDifference(
        tokens=ids.numel(),
        largest=float((first - second).abs().max()),
        mean_kl=float((first.exp() * (first - second)).sum(-1).mean()),
        same_argmax=float((first.argmax(-1) == second.argmax(-1)).double().mean()),
    )
