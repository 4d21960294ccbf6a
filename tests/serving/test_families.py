"""Model families whose modules are not Llama's, and the vocabulary's two ends, against PEFT's own forward."""

import atexit
import base64
import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from bdlora_perf.synthetic.reference import PeftReference
from tests.serving.zoo import PROMPTS, Zoo

NEW_TOKENS = 6
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
ENDS = ["embed_tokens", "lm_head"]
EIGHT_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Family:
    """A model, the adapters on it, and how it is served. ``full``: not in CI."""

    architecture: str
    tp: int
    adapters: dict[str, dict[str, Any]]
    model: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    full: bool = False


PHI3 = {
    "plain": {"rank": 6, "target_modules": FUSED},
    "bd2": {"rank": 8, "nblocks": 2, "target_modules": FUSED},
    # Blocks of the fused outputs end inside of q, k, v, gate and up.
    "bd4-rslora": {"rank": 8, "nblocks": 4, "target_modules": FUSED, "use_rslora": True},
    "qkv-layer1": {"rank": 4, "target_modules": ["qkv_proj"], "layers_to_transform": [1]},
}
LLAMA = {
    "ends": {"rank": 6, "target_modules": [*ENDS, "q_proj"]},
    "embedding": {"rank": 5, "target_modules": ["embed_tokens"]},
    "head-bd2": {"rank": 8, "nblocks": 2, "target_modules": ["lm_head", "down_proj"]},
    # Blocks of the vocabulary that end elsewhere than the ranks' padded shards.
    "head-bd4": {"rank": 8, "nblocks": 4, "target_modules": ["lm_head"]},
    "linear": {"rank": 4, "target_modules": ["up_proj"]},
}
GEMMA = {"embedding": {"rank": 6, "target_modules": ["embed_tokens", "v_proj"]}, "bd2": {"rank": 8, "nblocks": 2}}
TIED = {**LLAMA, "head": {"rank": 6, "target_modules": ["lm_head"]}}
EXPERTS = {
    "plain": {"rank": 6, "target_modules": ATTENTION},
    "bd2": {"rank": 8, "nblocks": 2, "target_modules": ["q_proj", "v_proj", "o_proj"]},
}
# Of the language model alone: the vision tower has gate, up and down projections, too.
OF_TEXT = r".*language_model.*\.({})"
VISION_LANGUAGE = {
    "plain": {"rank": 6, "target_modules": OF_TEXT.format("q_proj|v_proj|gate_proj|down_proj")},
    "bd2": {"rank": 8, "nblocks": 2, "target_modules": OF_TEXT.format("q_proj|k_proj|o_proj|up_proj|down_proj")},
}
ODD_VOCABULARY = {"vocab_size": 516}  # which SGLang pads to 576
ALL = {"lora_target_modules": ["all"], "max_lora_rank": 8}

FAMILIES = [
    Family("phi3", 2, PHI3, {"num_attention_heads": 24, "num_key_value_heads": 1}),
    Family("phi3", 1, PHI3, full=True),
    Family("phi3", 4, PHI3, EIGHT_HEADS, full=True),
    Family("llama", 2, LLAMA, ODD_VOCABULARY),
    Family("llama", 1, LLAMA, ODD_VOCABULARY, full=True),
    Family("llama", 4, LLAMA, {**ODD_VOCABULARY, **EIGHT_HEADS}, full=True),
    Family("qwen2", 2, TIED, {"tie_word_embeddings": True}, full=True),
    Family("gemma2", 1, GEMMA, full=True),
    Family("gemma2", 2, GEMMA, full=True),
    Family("gemma2", 4, GEMMA, EIGHT_HEADS, full=True),
    Family("qwen3_moe", 2, EXPERTS, engine=ALL, full=True),
    Family("qwen3_moe", 1, EXPERTS, full=True),
    Family("qwen3_moe", 4, EXPERTS, EIGHT_HEADS, full=True),
    Family("mixtral", 1, EXPERTS, engine=ALL),
    Family("mixtral", 2, EXPERTS, full=True),
    Family("qwen2_5_vl", 2, VISION_LANGUAGE),
    Family("qwen2_5_vl", 1, VISION_LANGUAGE, full=True),
    Family("qwen2_5_vl", 4, VISION_LANGUAGE, {"num_key_value_heads": 2}, full=True),
]


@dataclass
class Case:
    family: Family
    engine: Any
    model: Path
    adapters: dict[str, Path]
    reference: PeftReference

    def reference_of(self, name: str | None) -> tuple[PeftReference, Path | None]:
        """The model and the adapter that say what requests for ``name`` get."""
        return self.reference, self.adapters.get(name or "")

    def assert_equals_peft(self, names: list[str | None], path: Path | None = None) -> None:
        """Tokens, and log-probabilities within 1e-4, of new tokens and of the prompt, in one batch."""
        requests = [(name, prompt) for prompt in PROMPTS for name in names]
        answers = self.engine.generate(
            input_ids=[prompt for _, prompt in requests],
            lora_path=[name for name, _ in requests],
            sampling_params={"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
            return_logprob=True,
            logprob_start_len=[0 if index % 2 else -1 for index in range(len(requests))],
        )
        for (name, prompt), answer in zip(requests, answers, strict=True):
            reference, folder = self.reference_of(name)
            folder = path or folder
            expected = reference.generate(prompt, folder, NEW_TOKENS)
            assert answer["output_ids"] == expected.tokens, f"{name}: smallest logit gap {min(expected.gaps)}"
            assert _error(answer["meta_info"]["output_token_logprobs"], expected.logprobs) < 1e-4, name
            of_prompt = answer["meta_info"]["input_token_logprobs"][1:]
            if len(of_prompt) > 1:
                assert _error(of_prompt, reference.logprobs(prompt[:1], folder, prompt[1:])) < 1e-4, name


def _error(entries: list[Any], expected: list[float]) -> float:
    return max(abs(entry[0] - value) for entry, value in zip(entries, expected, strict=True))


def _named(family: Family) -> Any:
    marks = [pytest.mark.full] if family.full else []
    return pytest.param(family, id=f"{family.architecture}-tp{family.tp}", marks=marks)


@contextmanager
def engine_of(model: Path, adapters: dict[str, Path], tp: int, **options: Any) -> Iterator[Any]:
    from bdlora_sglang import Engine

    with pytest.MonkeyPatch.context() as patch:
        # The rows of an output head come in passes of so many.
        patch.setenv("SGLANG_ENABLE_LOGPROB_CHUNK", "1")
        patch.setenv("SGLANG_LOGPROB_CHUNK_SIZE", "32")
        engine = Engine(
            model_path=str(model),
            tp_size=tp,
            dtype="float32",
            lora_paths=[f"{name}={path}" for name, path in adapters.items()],
            max_loras_per_batch=len(adapters) + 1,
            max_running_requests=32,
            skip_tokenizer_init=True,
            log_level="error",
            **options,
        )
    try:
        yield engine
    finally:
        engine.shutdown()
        # SGLang would shut it down once more at exit, and log that to a stream which pytest has closed.
        atexit.unregister(engine.shutdown)


@pytest.fixture(scope="module", params=[_named(family) for family in FAMILIES])
def case(request: pytest.FixtureRequest, zoo: Zoo) -> Iterator[Case]:
    family: Family = request.param
    model = zoo.model(family.architecture, **family.model)
    adapters = {
        name: zoo.adapter(model, f"family-{name}", seed=60 + index, **spec)
        for index, (name, spec) in enumerate(family.adapters.items())
    }
    with engine_of(model, adapters, family.tp, **family.engine) as engine:
        yield Case(family, engine, model, adapters, PeftReference(model))


def test_tokens_and_logprobs_equal_peft(case: Case) -> None:
    case.assert_equals_peft([None, *case.adapters])


# --- What comes along with an adapter, on the one engine that serves everything -----------------------------------

WEIGHTS = "adapter_model.safetensors"


def _edit(folder: Path, tensors: dict[str, torch.Tensor], **fields: Any) -> None:
    save_file({**load_file(folder / WEIGHTS), **tensors}, folder / WEIGHTS)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))


def _base(case: Case, name: str) -> torch.Tensor:
    return load_file(next(case.model.glob("*.safetensors")))[name]


def _lora(module: str, rank: int = 4, inputs: int = 96, outputs: int = 96) -> dict[str, torch.Tensor]:
    shapes = {"A": (rank, inputs), "B": (outputs, rank)}
    return {f"base_model.model.{module}.lora_{factor}.weight": torch.ones(shape) for factor, shape in shapes.items()}


HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
HARMLESS: dict[str, Callable[[Case, Path], None]] = {
    "base-weights": lambda case, folder: _edit(
        folder,
        {
            f"base_model.model.{HEAD}": _base(case, HEAD),
            "base_model.model.model.embed_tokens.base_layer.weight": _base(case, EMBEDDING),
            f"base_model.model.{NORM}": _base(case, NORM),
            "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight": _base(
                case, "model.layers.0.mlp.up_proj.weight"
            ),
        },
        modules_to_save=["lm_head"],
    ),
    "vision": lambda case, folder: _edit(folder, _lora("model.visual.layers.0.mlp.up_proj")),
    "multi-token-prediction": lambda case, folder: _edit(folder, _lora("model.mtp_layers.0.mlp.up_proj")),
    "encoder": lambda case, folder: _edit(folder, _lora("model.encoder.layers.0.mlp.up_proj")),
    "not-targeted": lambda case, folder: _edit(folder, _lora("model.layers.0.self_attn.o_proj")),
    "buffer": lambda case, folder: _edit(
        folder, {"base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    ),
}
LOST: dict[str, tuple[Callable[[Case, Path], None], list[str]]] = {
    "trained-head": (
        lambda case, folder: _edit(
            folder, {f"base_model.model.{name}": _base(case, name) + 1e-3 for name in (HEAD, NORM)}
        ),
        [HEAD, NORM, "not the base model's own"],
    ),
    "trained-projection": (
        lambda case, folder: _edit(
            folder, {"base_model.model.model.layers.1.mlp.down_proj.weight": torch.zeros(96, 384)}
        ),
        ["layers.1.mlp.down_proj.weight", "not the base model's own"],
    ),
    "beyond-the-last-layer": (
        lambda case, folder: _edit(folder, _lora("model.layers.7.mlp.up_proj")),
        ["layers.7.mlp.up_proj", "layers 0 to 2"],
    ),
    "twice": (
        lambda case, folder: _edit(folder, _lora("model.language_model.layers.0.mlp.up_proj", 4, 96, 384)),
        ["layers.0.mlp.up_proj", "the same module as"],
    ),
    "linear-embedding": (
        lambda case, folder: _edit(
            folder, _lora("model.embed_tokens", 4, 516, 96), target_modules=["up_proj", "embed_tokens"]
        ),
        ["embed_tokens", "LoRA on an embedding"],
    ),
    "added-tokens": (
        lambda case, folder: (folder / "added_tokens.json").write_text("[1]"),
        ["added_tokens.json", "list", "a JSON object of token ids"],
    ),
    "vision-alone": (
        lambda case, folder: save_file(_lora("model.visual.layers.0.mlp.up_proj"), folder / WEIGHTS),
        ["visual.layers.0.mlp.up_proj", "no such parallel layer"],
    ),
}


@pytest.mark.parametrize("case", [_named(family) for family in FAMILIES if family.architecture == "llama"][:1],
                         indirect=True)  # fmt: skip
def test_what_comes_along(case: Case, tmp_path: Path) -> None:
    """What PEFT would not use, or has already, is skipped; what would be lost is refused by name."""
    for name, edit in HARMLESS.items():
        folder = shutil.copytree(case.adapters["linear"], tmp_path / name)
        edit(case, folder)
        result = case.engine.load_lora_adapter(name, str(folder))
        assert result.success, (name, result.error_message)
        case.assert_equals_peft([name], case.adapters["linear"])
        assert case.engine.unload_lora_adapter(name).success
    for name, (spoil, parts) in LOST.items():
        folder = shutil.copytree(case.adapters["linear"], tmp_path / name)
        spoil(case, folder)
        result = case.engine.load_lora_adapter(name, str(folder))
        assert not result.success, name
        for part in parts:
            assert part in result.error_message, (name, result.error_message)
    case.assert_equals_peft([None, "ends"])


@pytest.mark.parametrize("case", [_named(family) for family in FAMILIES if family.architecture == "qwen2_5_vl"][:1],
                         indirect=True)  # fmt: skip
def test_the_vision_tower_is_another(case: Case, zoo: Zoo) -> None:
    """Its layers have the numbers and the names of the language model's."""
    for name, targets in {"both": ["down_proj"], "vision": r".*visual.*\.down_proj"}.items():
        folder = zoo.adapter(case.model, f"tower-{name}", rank=4, target_modules=targets, seed=70)
        result = case.engine.load_lora_adapter(name, str(folder))
        assert not result.success
        assert "module 'model.visual.blocks.0.mlp.down_proj'" in result.error_message
    case.assert_equals_peft([None, "plain"])


@pytest.mark.parametrize("case", [_named(family) for family in FAMILIES if family.architecture == "qwen2_5_vl"],
                         indirect=True)  # fmt: skip
def test_images(case: Case) -> None:
    """Of two sizes, in one batch with prompts that have none."""
    processor = AutoProcessor.from_pretrained(case.model)
    text = "Hello! <|vision_start|><|image_pad|><|vision_end|> What is the capital of"
    images = [Image.radial_gradient("L").resize(size).convert("RGB") for size in ((84, 112), (140, 56))]
    # Prompts without any come first: transformers keeps an image's place for the text after it, whatever that is.
    requests = [(name, image) for image in (None, *images) for name in (None, *case.adapters)]
    answers = case.engine.generate(
        input_ids=[processor.tokenizer.encode(text) if image else PROMPTS[0] for _, image in requests],
        image_data=[[_url(image)] if image else None for _, image in requests],
        lora_path=[name for name, _ in requests],
        sampling_params={"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        return_logprob=True,
    )
    for (name, image), answer in zip(requests, answers, strict=True):
        reference, folder = case.reference_of(name)
        seen = processor(text=[text], images=[image], return_tensors="pt") if image else {}
        prompt = seen.pop("input_ids")[0].tolist() if image else PROMPTS[0]
        expected = reference.generate(prompt, folder, NEW_TOKENS, **seen)
        assert answer["output_ids"] == expected.tokens, (name, image)
        assert _error(answer["meta_info"]["output_token_logprobs"], expected.logprobs) < 1e-4, (name, image)


def _url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
