"""Linear layers whose weights oneDNN has packed once, after loading, or that are widened as they are read.

``F.linear`` packs a weight anew in every call, which is a third of a decode step. PyTorch's inductor packs ahead with
the same operators. Weights of 16 bits, for which a processor may have no instructions, are `widened_linear`'s then.
SGLang's seams: ``SRTPlatform.post_load_model`` swaps the layers' ``quant_method``, whose
``restore_weights_before_loading`` and ``process_weights_after_loading`` bracket every update of the weights.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.layers.linear import ColumnParallelLinear, RowParallelLinear
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from torch.nn.functional import linear

from bdlora_kernels.processor import has_products
from bdlora_sglang.serving.cpu.widened import widened_linear

# oneDNN's kernels for one to three rows are slower than the one for four (0.29 ms against 0.22 for a float32 weight of
# 1024 x 1024 on an AVX-512 core), so few rows are padded. The packed format is the same from two rows on.
_FEWEST_ROWS = 4
_ROWS_HINT = 8
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)

# Neither exists in a PyTorch without oneDNN. The overload is named, or PyTorch looks for it in every call.
_packing = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_product = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether this PyTorch has oneDNN's operators for the type of ``weight``, and the processor the instructions."""
    if _packing is None or _product is None or weight.layout != torch.strided or weight.device.type != "cpu":
        return False
    if weight.dtype == torch.float32:
        return torch.get_float32_matmul_precision() == "highest"
    return weight.dtype in _SIXTEEN_BITS and has_products(weight.dtype)


def is_widened(weight: torch.Tensor) -> bool:
    """Whether `widened_linear` is faster than PyTorch's own products for the type of ``weight``."""
    is_plain = weight.layout == torch.strided and weight.device.type == "cpu"
    return is_plain and weight.dtype in _SIXTEEN_BITS and not has_products(weight.dtype)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """``weight``, ``(outputs, inputs)``, in oneDNN's own layout; ``to_dense`` gives the same values back."""
    assert _packing is not None, "`can_pack` is asked first"
    return _packing(weight.detach(), _ROWS_HINT)


def packed_linear(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, few_rows: Sequence[torch.Tensor] | None = None
) -> torch.Tensor:
    """``x @ packed.T + bias`` for ``x`` of ``(..., inputs)``; ``few_rows`` may be `room_for_few_rows`, used again."""
    assert _product is not None, "`can_pack` is asked first"
    rows = x.numel() // x.shape[-1]
    if rows == 0:
        return x.new_zeros(*x.shape[:-1], packed.shape[0])
    if rows >= _FEWEST_ROWS:
        return _product(x, packed, bias, "none", [], "")
    room = room_for_few_rows(packed) if few_rows is None else few_rows
    room[rows].copy_(x.view(rows, -1) if x.dim() != 2 else x)
    output = _product(room[0], packed, bias, "none", [], "")[:rows]
    return output if x.dim() == 2 else output.view(*x.shape[:-1], -1)


def room_for_few_rows(weight: torch.Tensor) -> list[torch.Tensor]:
    """Where a layer's inputs are padded: whole, and its first row, two and three, as slicing costs as much as copying.

    What is left there by an earlier call does no harm.
    """
    with torch.inference_mode(False):  # or it could not be written to outside of that mode
        whole = torch.zeros(_FEWEST_ROWS, weight.shape[1], dtype=weight.dtype)
        return [whole, *(whole[:rows] for rows in range(1, _FEWEST_ROWS))]


class PackedLinearMethod(UnquantizedLinearMethod):
    """Packs ``layer.weight`` itself: no unpacked copy stays, and whoever holds the parameter holds the packed one."""

    def process_weights_after_loading(self, layer: Any) -> None:
        if can_pack(layer.weight):
            _replace(layer.weight, pack(layer.weight))
            self._few_rows = room_for_few_rows(layer.weight)

    def restore_weights_before_loading(self, layer: Any) -> None:
        if layer.weight.is_mkldnn:
            _replace(layer.weight, layer.weight.detach().to_dense())

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        weight = layer.weight
        return packed_linear(x, weight, bias, self._few_rows) if weight.is_mkldnn else linear(x, weight, bias)


class PackedLogitsMethod(UnquantizedEmbeddingMethod):
    """The vocabulary projection of an embedding that is looked up, too (tied), so the unpacked weight stays."""

    _packed: torch.Tensor | None = None

    def process_weights_after_loading(self, layer: Any) -> None:
        packed = pack(layer.weight) if can_pack(layer.weight) else None
        if self._packed is None or packed is None:
            self._packed = packed
        else:  # recorded decode steps hold the same tensor
            torch.utils.swap_tensors(self._packed, packed)  # type: ignore[no-untyped-call]
        layer.packed_weight = self._packed

    def restore_weights_before_loading(self, layer: Any) -> None:
        layer.packed_weight = None

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        packed = layer.packed_weight
        return linear(x, layer.weight, bias) if packed is None else packed_linear(x, packed, bias)


class _Widening:
    """Leaves the weight as it is."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return widened_linear(x, layer.weight, bias)


class WidenedLinearMethod(_Widening, UnquantizedLinearMethod):
    """Of a parallel linear layer."""


class WidenedLogitsMethod(_Widening, UnquantizedEmbeddingMethod):
    """Of the vocabulary projection, whose weight may be looked up, too."""


_PACKING = (PackedLinearMethod, PackedLogitsMethod)


def choose_linear_methods(model: torch.nn.Module) -> None:
    """Pack or widen all unquantised parallel linear layers and the vocabulary projection.

    Replicated layers stay: models read the weights of some (MoE routers) themselves.
    """
    for module in model.modules():
        if not isinstance(module, ColumnParallelLinear | RowParallelLinear):
            continue
        if type(module.quant_method) is UnquantizedLinearMethod:
            _use(module, PackedLinearMethod, WidenedLinearMethod)
    for name, head in model.named_modules(remove_duplicate=False):  # tied embeddings have two names
        if name.rpartition(".")[2] != "lm_head" or not isinstance(head, VocabParallelEmbedding):
            continue
        if type(head.quant_method) is UnquantizedEmbeddingMethod and _logits_are_plain(model):
            packing = PackedLinearMethod if _only_projects(head, model) else PackedLogitsMethod
            _use(head, packing, WidenedLogitsMethod)


@contextmanager
def unpacked(model: torch.nn.Module) -> Iterator[None]:
    """The model's weights as they were loaded, for whoever reads them."""
    layers: list[Any] = [
        module for module in model.modules() if isinstance(getattr(module, "quant_method", None), _PACKING)
    ]
    for layer in layers:
        layer.quant_method.restore_weights_before_loading(layer)
    try:
        yield
    finally:
        for layer in layers:
            layer.quant_method.process_weights_after_loading(layer)


def _use(layer: Any, packing: type[Any], widening: type[Any]) -> None:
    """Give a layer the method for its weight on this processor, which may be SGLang's."""
    if can_pack(layer.weight):
        layer.quant_method = packing()
        layer.quant_method.process_weights_after_loading(layer)
    elif is_widened(layer.weight):
        layer.quant_method = widening()


def _only_projects(head: Any, model: torch.nn.Module) -> bool:
    """Whether nothing but the logits reads the head's weight, which tied embeddings do."""
    holders = [module for module in model.modules() if getattr(module, "weight", None) is head.weight]
    return isinstance(head, ParallelLMHead) and len(holders) == 1


def _logits_are_plain(model: torch.nn.Module) -> bool:
    """Whether logits are computed in the model's own type: the other ways of SGLang read the head's weight."""
    processors = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
    return bool(processors) and not any(
        processor.use_fp32_lm_head or processor.rl_on_policy_target is not None for processor in processors
    )


def _replace(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Give a parameter another layout in place: its layer, a LoRA wrapper and the model's loader hold the same one."""
    other = torch.nn.Parameter(value, requires_grad=False)
    other.__dict__.update(parameter.__dict__)  # the weight loader's attributes
    torch.utils.swap_tensors(parameter, other)  # type: ignore[no-untyped-call]
