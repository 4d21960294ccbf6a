"""Adapters with something wrong in them: each is refused with its reason, or read as PEFT reads it."""

import copy
import dataclasses
import json
import warnings
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from peft import BdLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from bdlora_sglang.adapter import Adapter, LoRAModule, ModuleShard, read_slice, slice_module
from bdlora_sglang.errors import BDLoRAError
from tests.fuzzing import fuzz_settings

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODULES = ("q_proj", "o_proj", "lm_head")
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": [*MODULES, "embed_tokens"]},
    "patterns": {"target_modules": list(MODULES), "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 3}},
    "bdlora": {
        "target_modules": list(MODULES),
        "use_bdlora": BdLoraConfig(
            target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2, match_strict=False
        ),
    },
}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)


class Causal(nn.Module):
    """Without weights: what a layer computes is its delta."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(12, 8)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.lm_head = nn.Linear(8, 12, bias=False)
        for weight in self.parameters():
            nn.init.zeros_(weight)


SIZES: dict[str, tuple[int, ...]] = {
    name.removesuffix(".weight"): tuple(weight.T.shape if "embed" in name else weight.shape)
    for name, weight in Causal().named_parameters()
}


@cache
def saved(kind: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and tensors of an adapter of PEFT's own."""
    torch.manual_seed(0)
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **copy.deepcopy(KINDS[kind]))
        get_peft_model(Causal(), config).save_pretrained(folder, save_embedding_layers=False)
        # PEFT then makes zeros of what has no tensors.
        fields = {**json.loads((Path(folder) / CONFIG).read_text()), "init_lora_weights": True}
        return fields, load_file(Path(folder) / WEIGHTS)


NAMES = st.sampled_from([*MODULES, "embed_tokens", "layers.0.q_proj", "layers", r".*\.1\..*", "_proj", "", "*", "none"])
NUMBERS = st.sampled_from([0, 1, 2, 3, 4, 8, -1, 1 << 40, 2.5, 0.0, float("nan"), float("inf")])
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, NAMES)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.dictionaries(NAMES, SCALARS, max_size=2),
    st.fixed_dictionaries(
        {"nblocks": SCALARS},
        optional={
            "target_modules_bd_a": st.lists(NAMES, max_size=2),
            "target_modules_bd_b": st.lists(NAMES, max_size=2),
            "match_strict": SCALARS,
        },
    ),
)
FIELDS = st.sampled_from([field.name for field in dataclasses.fields(LoraConfig)] + ["unknown"])
CONFIG_CHANGES = st.tuples(st.sampled_from(["set", "remove"]), FIELDS, VALUES)
TENSOR_CHANGES = st.tuples(
    st.sampled_from(["drop", "rename", "copy", "transpose", "shorten", "flatten", "cast", "spoil"]),
    st.integers(0, 30),
    st.tuples(
        # Not PEFT's prefix: we take a name without it as well.
        st.sampled_from(["lora_A", "lora_B", "q_proj", "layers.0", "weight"]),
        st.sampled_from(["lora_A", "lora_B", "o_proj", "layers.1", "layers.7", "bias", "", "lora_A.default"]),
    ),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool]),
)
# The file, the place from its start or end, how many bytes go, and what comes for them.
BYTE_CHANGES = st.tuples(
    st.sampled_from([CONFIG, WEIGHTS]), st.integers(-400, 800), st.integers(0, 40), st.binary(max_size=12)
)


def spoil_tensors(tensors: dict[str, torch.Tensor], change: Any) -> None:
    what, index, (old, new), dtype = change
    name = sorted(tensors)[index % len(tensors)]
    tensor = tensors[name]
    if what in ("drop", "rename"):
        del tensors[name]
    if what in ("rename", "copy"):
        tensors[name.replace(old, new)] = tensor.clone()
    elif what == "transpose":
        tensors[name] = tensor.T.contiguous()
    elif what == "shorten":
        tensors[name] = tensor[: index % (len(tensor) + 1)].contiguous()
    elif what == "flatten":
        tensors[name] = tensor.flatten()
    elif what == "cast":
        tensors[name] = tensor.to(dtype)
    elif what == "spoil":
        tensors[name] = tensor * float("nan") if index % 2 else tensor * float("inf")
    if not tensors:
        tensors["nothing"] = torch.zeros(1)


def read(folder: Path) -> dict[str, torch.Tensor] | None:
    """Our deltas by module; None where the adapter is refused, does not fit the model, or comes with more than LoRA."""
    try:
        adapter = Adapter.open(folder)
        if adapter.saved or any(sizes(module) != SIZES.get(name) for name, module in adapter.modules.items()):
            return None
        return {name: delta(adapter, name) for name in adapter.modules}
    except BDLoRAError:
        return None


def sizes(module: LoRAModule) -> tuple[int, int]:
    return module.out_features, module.in_features


def delta(adapter: Adapter, name: str) -> torch.Tensor:
    module = adapter.modules[name]
    delta = torch.zeros(module.out_features, module.in_features)
    for part in slice_module(module, ModuleShard(range(module.in_features), range(module.out_features))):
        factors = read_slice(adapter, part, torch.float32)
        window = delta[part.output_start :][: part.output_size, part.input_start :][:, : part.input_size]
        window += factors.scaling * factors.b @ factors.a
    return delta


def read_by_peft(folder: Path) -> dict[str, torch.Tensor]:
    """PEFT's deltas by module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(Causal(), str(folder)).base_model.model.eval().float()
    deltas = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "get_base_layer"):
            base = layer.get_base_layer()
            inputs = torch.arange(12) if isinstance(base, nn.Embedding) else torch.eye(base.in_features)
            with torch.no_grad():
                deltas[name] = layer(inputs).T
    return deltas


@fuzz_settings(300)
@given(
    kind=st.sampled_from(list(KINDS)),
    of_config=st.lists(CONFIG_CHANGES, max_size=2),
    of_tensors=st.lists(TENSOR_CHANGES, max_size=2),
    of_bytes=st.lists(BYTE_CHANGES, max_size=1),
)
@example(kind="plain", of_config=[("set", "kasa_config", {})], of_tensors=[], of_bytes=[])
@example(kind="bdlora", of_config=[], of_tensors=[], of_bytes=[])
@example(kind="plain", of_config=[], of_tensors=[], of_bytes=[])
@example(kind="patterns", of_config=[], of_tensors=[], of_bytes=[])
def test_refused_or_as_peft(kind: str, of_config: list[Any], of_tensors: list[Any], of_bytes: list[Any]) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, kind, of_config, of_tensors, of_bytes)
        if (ours := read(folder)) is None:
            assert of_config or of_tensors or of_bytes, "an adapter with nothing wrong in it"
            return
        try:
            expected = read_by_peft(folder)
        except Exception:
            # PEFT looks at the fields of training as well.
            if of_config or any(file == CONFIG for file, *_ in of_bytes):
                return
            raise
    for module in ours.keys() | expected.keys():
        zeros = torch.zeros(SIZES[module])
        torch.testing.assert_close(
            ours.get(module, zeros), expected.get(module, zeros), rtol=1e-4, atol=1e-6, equal_nan=True, msg=module
        )


def write(folder: Path, kind: str, of_config: list[Any], of_tensors: list[Any], of_bytes: list[Any]) -> None:
    """An adapter with these faults."""
    config, tensors = copy.deepcopy(saved(kind)[0]), dict(saved(kind)[1])
    for what, field, value in of_config:
        config.pop(field, None)
        if what == "set":
            config[field] = value
    for change in of_tensors:
        spoil_tensors(tensors, change)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)
    for file, place, removed, added in of_bytes:
        content = bytearray((folder / file).read_bytes())
        place = place if place >= 0 else max(0, len(content) + place)
        content[place : place + removed] = added
        (folder / file).write_bytes(bytes(content))
