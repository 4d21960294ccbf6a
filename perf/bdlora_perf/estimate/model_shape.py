"""The shapes of a dense decoder: hidden size, heads, layers, and its linear modules as tensor parallelism cuts them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from bdlora_sglang.convert.sides import TPSide
from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.model_names import MODEL_NAMES

BYTES_PER_WEIGHT = 2  # bfloat16


@dataclass(frozen=True)
class Linear:
    """A linear module; ``shard`` is the part of its outputs (column) or inputs (row) that one rank holds."""

    side: TPSide
    inputs: int
    outputs: int
    shard: float
    name: str = ""

    @property
    def local_inputs(self) -> float:
        return self.inputs * (self.shard if self.side is TPSide.ROW else 1)

    @property
    def local_outputs(self) -> float:
        return self.outputs * (self.shard if self.side is TPSide.COLUMN else 1)


@dataclass(frozen=True)
class ModelShape:
    """A Llama-like model: q, k and v are one fused layer, so are gate and up."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False

    def check_tp(self, tp: int) -> None:
        """Raise `BDLoRAError` unless tensor parallelism can cut the model in ``tp`` even parts."""
        for what, size in (("heads", self.heads), ("an intermediate size", self.intermediate)):
            if tp < 1 or size % tp:
                raise BDLoRAError(f"--tp: found {tp} and {what} of {size}, expected a divisor of {size}")
        if self.kv_heads % tp and tp % self.kv_heads:
            raise BDLoRAError(f"--tp: found {tp} and {self.kv_heads} KV heads, expected one to divide the other")

    def one_rank_of(self, tp: int) -> "ModelShape":
        """What one of ``tp`` ranks holds and computes, as a model of its own.

        Raises:
            BDLoRAError: the model cannot be cut so.
        """
        self.check_tp(tp)
        return replace(
            self,
            heads=self.heads // tp,
            kv_heads=self.local_kv_heads(tp),
            intermediate=self.intermediate // tp,
            vocabulary=-(-self.vocabulary // tp),
        )

    def local_kv_heads(self, tp: int) -> int:
        """KV heads of one rank: they are copied where there are fewer than ranks."""
        return max(1, self.kv_heads // tp)

    def fused_layers(self, tp: int) -> tuple[tuple[Linear, ...], ...]:
        """The linear modules of one decoder layer, those of a fused layer together."""
        q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        even, kv_shard = 1 / tp, self.local_kv_heads(tp) / self.kv_heads
        column, row = TPSide.COLUMN, TPSide.ROW
        q = Linear(column, self.hidden, q_size, even, "q_proj")
        k, v = (Linear(column, self.hidden, kv_size, kv_shard, name) for name in ("k_proj", "v_proj"))
        o = Linear(row, q_size, self.hidden, even, "o_proj")
        gate, up = (Linear(column, self.hidden, self.intermediate, even, name) for name in ("gate_proj", "up_proj"))
        down = Linear(row, self.intermediate, self.hidden, even, "down_proj")
        return (q, k, v), (o,), (gate, up), (down,)

    def linears(self, tp: int = 1) -> Iterator[Linear]:
        """The seven linear modules of one decoder layer."""
        return (linear for layer in self.fused_layers(tp) for linear in layer)

    def weight_bytes(self, tp: int) -> float:
        """Bytes of the weights on one GPU: linear modules, embedding and output head (once where they are tied)."""
        linears = sum(linear.inputs * linear.outputs * linear.shard for linear in self.linears(tp))
        tables = 1 if self.tied else 2
        return (self.layers * linears + tables * self.vocabulary * self.hidden / tp) * BYTES_PER_WEIGHT

    def kv_bytes_per_token(self, tp: int) -> float:
        """Bytes of the KV cache on one GPU for one position."""
        return self.layers * 2 * self.local_kv_heads(tp) * self.head_dim * BYTES_PER_WEIGHT


# The models' own config.json.
_LLAMA_8B = ModelShape("Llama-3.1-8B", 4096, 32, 32, 8, 128, 14336, 128256)
_LLAMA_70B = ModelShape("Llama-3.1-70B", 8192, 80, 64, 8, 128, 28672, 128256)
SHAPES: Mapping[str, ModelShape] = {
    "llama-3.1-8b": _LLAMA_8B,
    "llama-3.1-8b-instruct": _LLAMA_8B,
    "llama-3.1-70b": _LLAMA_70B,
    "llama-3.1-70b-instruct": _LLAMA_70B,
    "llama-3.3-70b-instruct": _LLAMA_70B,
    "llama-3.1-405b": ModelShape("Llama-3.1-405B", 16384, 126, 128, 8, 128, 53248, 128256),
    "mistral-7b": ModelShape("Mistral-7B", 4096, 32, 32, 8, 128, 14336, 32768),
    "qwen2.5-7b": ModelShape("Qwen2.5-7B", 3584, 28, 28, 4, 128, 18944, 152064),
    "qwen2.5-72b": ModelShape("Qwen2.5-72B", 8192, 80, 64, 8, 128, 29568, 152064),
    "qwen3-8b": ModelShape("Qwen3-8B", 4096, 36, 32, 8, 128, 12288, 151936),
    "qwen3-32b": ModelShape("Qwen3-32B", 5120, 64, 64, 8, 128, 25600, 151936),
}
_BY_REPO = {repo.lower(): SHAPES[name] for name, repo in MODEL_NAMES.items()}


class _Config(BaseModel):
    """The fields of Hugging Face's ``config.json`` that the estimate needs, by their names in `ModelShape`."""

    hidden: int = Field(gt=0, alias="hidden_size")
    layers: int = Field(gt=0, alias="num_hidden_layers")
    heads: int = Field(gt=0, alias="num_attention_heads")
    kv_heads: int | None = Field(default=None, gt=0, alias="num_key_value_heads")
    head_dim: int | None = Field(default=None, gt=0)
    intermediate: int = Field(gt=0, alias="intermediate_size")
    vocabulary: int = Field(gt=0, alias="vocab_size")
    tied: bool = Field(default=False, alias="tie_word_embeddings")
    num_experts: None = None
    num_local_experts: None = None
    n_routed_experts: None = None


def load_shape(model: str) -> ModelShape:
    """The shape of a short name or its repo id, of a model folder, or of a ``config.json``.

    Raises:
        BDLoRAError: none of these, or a config that is not a dense decoder's.
    """
    known = SHAPES.get(model.lower()) or _BY_REPO.get(model.lower())
    if known is not None:
        return known
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise BDLoRAError(
            f"--model {model}: found neither a model folder nor a config.json, expected one or a short name "
            f"({', '.join(SHAPES)})"
        )
    try:
        config = _Config.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise BDLoRAError(
            f"{path}: {where}: found {str(problem['input'])[:60]!r}, expected the config of a dense decoder "
            f"({problem['msg']})"
        ) from error
    # A dense decoder's experts are None, too.
    sizes = config.model_dump(exclude_none=True)
    sizes.setdefault("kv_heads", config.heads)
    sizes.setdefault("head_dim", config.hidden // config.heads)
    return ModelShape(path.resolve().parent.name, **sizes)
