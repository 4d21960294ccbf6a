"""Names, targets and files as PEFT and training frameworks write them, and what of them PEFT uses."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS
from safetensors.torch import load_file, save_file
from torch import nn

from bdlora_sglang.adapter import Adapter
from bdlora_sglang.adapter.patterns import MOST_CHARACTERS, MOST_EXPRESSIONS
from bdlora_sglang.adapter.targets import DEFAULT_TARGETS
from bdlora_sglang.adapter.tensors import refuse_ignored
from bdlora_sglang.errors import AdapterError
from tests.adapter.drafts import CONFIG, WEIGHTS, Draft

INDEX = f"{WEIGHTS}.index.json"


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(8, 16), nn.Linear(16, 8)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(12, 8)
        self.layers = nn.ModuleList([Layer(), Layer(), Layer()])
        self.norm = nn.LayerNorm(8)


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Decoder()
        self.lm_head = nn.Linear(8, 12, bias=False)


def saved(folder: Path, **fields: Any) -> Path:
    """An adapter of PEFT's on every kind of module, with weights that are not zero."""
    fields = {"r": 4, "target_modules": ["q_proj", "o_proj", "embed_tokens", "lm_head"], **fields}
    model = get_peft_model(Causal(), LoraConfig(init_lora_weights=False, **fields))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder))
    return edit_config(folder, task_type="CAUSAL_LM")


def peft_uses(folder: Path) -> set[str]:
    """The modules on which PEFT has LoRA once it has loaded the folder, with weights that come from its file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig.from_pretrained(str(folder))
        config.task_type = None  # which asks for a model that generates
        model = PeftModel.from_pretrained(Causal(), str(folder), config=config)
    found = set()
    stored = list(load_file(folder / WEIGHTS).values())
    for name, layer in model.base_model.model.named_modules():
        for factors in ("lora_A", "lora_embedding_A"):
            factor = dict(getattr(layer, factors, {}) or {}).get("default")
            weight = getattr(factor, "weight", factor)
            if weight is not None and any(torch.equal(weight, tensor) for tensor in stored):
                found.add(name)
    return found


def rename(folder: Path, new_name: Callable[[str], str]) -> Path:
    tensors = load_file(folder / WEIGHTS)
    save_file({new_name(name): tensor for name, tensor in tensors.items()}, folder / WEIGHTS)
    return folder


def edit_config(folder: Path, **fields: Any) -> Path:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))
    return folder


SPELLINGS: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled-outside": lambda name: f"_orig_mod.{name}",
    "compiled-layers": lambda name: re.sub(r"(layers\.\d+\.)", r"\1_orig_mod.", name),
    "fsdp": lambda name: re.sub(r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module.", f"_fsdp_wrapped_module.{name}"),
    "checkpointed": lambda name: re.sub(r"(layers\.\d+\.)", r"\1_checkpoint_wrapped_module.", name),
    "data-parallel": lambda name: f"module.{name}",
    "no-prefix": lambda name: name.removeprefix("base_model.model."),
    "twice": lambda name: f"base_model.model.{name}",
    "no-decoder": lambda name: name.replace("base_model.model.model.", "base_model.model."),
    "adapter-name": lambda name: re.sub(r"lora_(A|B)\.", r"lora_\1.default.", name),
    "other-adapter-name": lambda name: re.sub(r"(lora_[AB]|lora_embedding_[AB])(\.|$)", r"\1.my-sql\2", name),
    "unembed": lambda name: name.replace("lm_head", "unembed_tokens"),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=list(SPELLINGS))
def test_every_spelling_is_one_name(spelling: Callable[[str], str], tmp_path: Path) -> None:
    adapter = Adapter.open(rename(saved(tmp_path / "adapter"), spelling))
    expected = peft_uses(saved(tmp_path / "as saved"))
    assert len(expected) == 8 and adapter.modules.keys() == expected
    assert not adapter.saved and not adapter.ignored
    embedding, head = adapter.modules["model.embed_tokens"], adapter.modules["lm_head"]
    assert (embedding.is_embedding, embedding.in_features, embedding.out_features) == (True, 12, 8)
    assert (head.is_embedding, head.in_features, head.out_features) == (False, 8, 12)


def test_a_model_without_a_head_keeps_its_names(tmp_path: Path) -> None:
    model = get_peft_model(Decoder(), LoraConfig(r=4, target_modules=["q_proj"], task_type="FEATURE_EXTRACTION"))
    model.save_pretrained(str(tmp_path))
    assert list(Adapter.open(tmp_path).modules) == [f"layers.{layer}.q_proj" for layer in range(3)]


CHOICES: dict[str, dict[str, Any]] = {
    "fewer": {"target_modules": ["q_proj"]},
    "by-regex": {"target_modules": r".*\.1\.\w_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "layers": {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]},
    "no-layers-pattern": {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": ""},
    "without-a-module": {"exclude_modules": ["o_proj", "lm_head"]},
    "without-a-name": {"exclude_modules": ["model.layers.1.self_attn.q_proj", "model.layers.1.q_proj"]},
    "without-a-regex": {"exclude_modules": r".*(embed|layers\.[12]).*"},
}


@pytest.mark.parametrize("fields", CHOICES.values(), ids=list(CHOICES))
def test_what_the_config_does_not_target_is_without_a_use(fields: dict[str, Any], tmp_path: Path) -> None:
    """As for PEFT, which warns; with strict loading it is refused, and all of it listed."""
    folder = edit_config(saved(tmp_path / "adapter"), **fields)
    adapter = Adapter.open(folder)
    expected = peft_uses(folder) - ({"lm_head"} if fields.get("target_modules") == "all-linear" else set())
    assert adapter.modules.keys() == expected and 0 < len(expected) < 8
    unused = {name for name in load_file(folder / WEIGHTS) if not any(module in name for module in expected)}
    assert adapter.ignored.keys() == unused
    with pytest.raises(AdapterError) as caught:
        refuse_ignored(adapter.ignored, adapter.checkpoint.source)
    assert all(f"'{name}'" in caught.value.subject for name in unused)


def test_exclude_modules_as_peft() -> None:
    names = ["lm_head", "model.layers.0.q_proj", "model.layers.10.mlp.q_proj", "vision.layers.0.q_proj", "q_proj"]
    for exclude in (["q_proj"], ["layers.0.q_proj"], r"vision\..*", "q_proj", [], "", None):
        for saved_modules in (None, ["lm_head"], ["layers.0"], [r"layers\.\d+"]):
            fields: dict[str, Any] = {
                "target_modules": ["q_proj", "lm_head"], "exclude_modules": exclude, "modules_to_save": saved_modules,
            }  # fmt: skip
            draft = Draft()
            config = Adapter.from_tensors(draft.tensors, draft.config, "draft").config.from_dict(
                {**draft.config, **fields}, "config"
            )
            for name in names:
                expected = check_target_module_exists(LoraConfig(**fields), name)
                assert config.adapts(name) == bool(expected), (name, fields)


@pytest.mark.parametrize("model_type", sorted(DEFAULT_TARGETS))
def test_default_targets_are_pefts(model_type: str) -> None:
    assert list(DEFAULT_TARGETS[model_type]) == PEFT_DEFAULTS[model_type]


def test_no_target_modules(tmp_path: Path) -> None:
    folder = edit_config(saved(tmp_path / "adapter"), target_modules=None)
    assert {name.rpartition(".")[2] for name in Adapter.open(folder, "phi").modules} == {"q_proj"}
    assert {name.rpartition(".")[2] for name in Adapter.open(folder).modules} == {"q_proj", "o_proj"}


def test_weights_saved_along(tmp_path: Path) -> None:
    """Of trained modules, of embeddings with LoRA, and of any other parameter, by the name in the base model."""
    folder = saved(tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    tensors = load_file(folder / WEIGHTS)
    extra = {
        "base_model.model.model.embed_tokens.base_layer.weight": torch.ones(12, 8),
        "base_model.model.model.norm.bias": torch.ones(8),
    }
    save_file({**tensors, **extra}, folder / WEIGHTS)
    adapter = Adapter.open(folder)
    assert set(adapter.saved) == {"lm_head.weight", "model.embed_tokens.weight", "model.norm.bias"}
    assert torch.equal(adapter.checkpoint.read_whole(adapter.saved["model.norm.bias"]), torch.ones(8))
    head = next(name for name in tensors if "lm_head" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != head}, folder / WEIGHTS)
    with pytest.raises(AdapterError, match=r"'lm_head'.*no such tensor"):
        Adapter.open(folder)


def test_tied_lora_is_refused(tmp_path: Path) -> None:
    folder = edit_config(saved(tmp_path / "adapter"), ensure_weight_tying=True)
    with pytest.raises(AdapterError, match="ensure_weight_tying"):
        Adapter.open(folder)


# --- Files ---------------------------------------------------------------------------------------------------------


def split(folder: Path) -> Path:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map = {}
    for part in range(3):
        file = f"adapter_model-0000{part + 1}-of-00003.safetensors"
        own = {name: tensor for index, (name, tensor) in enumerate(sorted(tensors.items())) if index % 3 == part}
        save_file(own, folder / file)
        weight_map.update(dict.fromkeys(own, file))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_several_files(tmp_path: Path) -> None:
    one, several = saved(tmp_path / "one"), saved(tmp_path / "several")
    (several / WEIGHTS).write_bytes((one / WEIGHTS).read_bytes())
    a, b = Adapter.open(one), Adapter.open(split(several))
    assert a.modules == b.modules
    for name in a.checkpoint.names():
        assert torch.equal(a.checkpoint.read_whole(name), b.checkpoint.read_whole(name))
        rectangle = range(1, 3), range(2, 4)
        assert torch.equal(a.checkpoint.read(name, *rectangle), b.checkpoint.read(name, *rectangle))
    assert a.checkpoint.bytes_read == b.checkpoint.bytes_read > 0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda weight_map: {}, "no LoRA tensors"),
        (lambda weight_map: dict.fromkeys(weight_map, "../one/adapter_model.safetensors"), "beside the index"),
        (lambda weight_map: dict.fromkeys(weight_map, "/etc/passwd.safetensors"), "beside the index"),
        (lambda weight_map: dict.fromkeys(weight_map, "adapter_model.bin"), "beside the index"),
        (lambda weight_map: dict.fromkeys(weight_map, "missing.safetensors"), "no such file"),
        (lambda weight_map: {**weight_map, "more": next(iter(weight_map.values()))}, "'more'.*no such tensor"),
        (lambda weight_map: [1], "no such map"),
    ],
)
def test_an_index_that_lies(edit: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    folder = split(saved(tmp_path / "several"))
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(AdapterError, match=message):
        Adapter.open(folder)


# --- Hostile configs -----------------------------------------------------------------------------------------------

# Not the well-known `(a+)+!`, which fails at once where the text has no "!".
HANGS = r"(.|.|..)+(?<=!)"


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern",
                                   "layers_pattern", "modules_to_save"])  # fmt: skip
def test_a_pattern_that_takes_for_ever(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bdlora_sglang.adapter.patterns.SECONDS", 0.3)
    draft = Draft()
    value: Any = {HANGS: 8} if field.endswith("_pattern") and field != "layers_pattern" else HANGS
    draft.config |= {field: [value] if field == "modules_to_save" else value, "layers_to_transform": [0]}
    draft.tensors |= {"base_model.model.norm.weight": torch.ones(8)}
    draft.tensors = {name.replace("self_attn", "self_attn" * 20): tensor for name, tensor in draft.tensors.items()}
    with pytest.raises(AdapterError, match="takes longer than"):
        Adapter.from_tensors(draft.tensors, draft.config, "hostile")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": "(" * 500 + "q" + ")" * 500 + "+" * 2}, "regular expression|does not target|no LoRA"),
        ({"target_modules": "q|" * MOST_CHARACTERS}, f"at most {MOST_CHARACTERS}"),
        ({"rank_pattern": {f"q{index}?": 8 for index in range(MOST_EXPRESSIONS + 1)}}, f"more than {MOST_EXPRESSIONS}"),
        ({"use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["x"] * 10_001}}, "at most 10000"),
        ({"lora_alpha": 1e300}, "float32 can hold"),
        ({"alpha_pattern": {"q_proj": 1e300}}, "float32 can hold"),
    ],
    ids=["nested", "long", "many", "sides", "scaling", "scaling-by-pattern"],
)
def test_limits(fields: dict[str, Any], message: str) -> None:
    draft = Draft()
    draft.config |= fields
    with pytest.raises(AdapterError, match=message):
        Adapter.from_tensors(draft.tensors, draft.config, "hostile")


def test_a_config_of_any_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bdlora_sglang.adapter.json_file.MOST_BYTES", 1000)
    folder = Draft().save(tmp_path / "adapter")
    edit_config(folder, padding="x" * 1000)
    with pytest.raises(AdapterError, match="more than 1000 bytes"):
        Adapter.open(folder)


def test_thousands_of_names_in_a_pattern() -> None:
    """As converted MoE adapters have: looked up, not matched one by one. A dot is still any character."""
    draft = Draft()
    names = {f"model.layers.{layer}.self_attn.o_proj": 8 for layer in range(100_000)}
    draft.config["rank_pattern"] = {**names, "self.attn.q_proj": 8, "q_proj": 12}
    config = Adapter.from_tensors(draft.tensors, draft.config, "many").config
    assert config.rank("model.layers.7.self_attn.q_proj") == 8
    assert config.rank("model.layers.7.mlp.q_proj") == 12
