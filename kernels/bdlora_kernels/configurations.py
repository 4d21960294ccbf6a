"""Launch configurations: a formula, and files of what was measured to be faster, one an architecture."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.abc import Traversable
from importlib.resources import files
from typing import Any

import torch

# Beyond so many tokens an eager batch is a prefill: its tiles of tokens are larger.
DECODE_TOKENS = 256
DECODE_BLOCK_TOKENS, PREFILL_BLOCK_TOKENS = 16, 32
# Architectures whose machine code is tested: compute capabilities, such as 90 for sm_90.
ARCHITECTURES = (80, 90, 100)
# Programs of a shrink, about: four for each multiprocessor of an H100, so that large batches have few partial sums.
_SHRINK_PROGRAMS = 512
_MAX_SPLITS = 16
# Up to so many, a small block of A has room in shared memory.
_FEW_INPUTS = 1024
# Inputs of a split, at least: one step of the loop of a decode. Steps follow one another, splits run side by side.
_MIN_SPLIT_INPUTS = 128
# Of A100, H100 and B200 multiprocessors, the second-level cache, and what memory brings in 0.8 us: a trip and one for
# the table.
_GPUS = {80: (108, 40 * 2**20, 1_500_000), 90: (132, 50 * 2**20, 2_400_000), 100: (148, 126 * 2**20, 5_800_000)}
_ELEMENT_BYTES = 2
# From so many on, blocks of 128 outputs are more programs than fit at a time as soon as some 32 tiles share them.
_MANY_OUTPUTS = 2048
# Inputs of a split where splits must not depend on the batch.
_DETERMINISTIC_SPLIT_INPUTS, _MAX_DETERMINISTIC_SPLITS = 2048, 4


@dataclass(frozen=True)
class Configuration:
    """How the kernels are launched.

    ``overlap``: the shrink runs on a second stream beside the base layer's own product, which in decode is bound by
    memory and leaves multiprocessors idle, and brings what the expand reads first to the cache, with ``prefetch_b`` B
    too. Else it runs after the product, and with ``pdl`` (programmatic dependent launch, from sm_90 on) the expand is
    set up while the shrink runs. ``splits``: parts of the
    inputs that different programs sum up. ``tokens_at_once``: those of a tile that the expand multiplies together, with
    ``block_r`` ranks of ``block_o`` outputs.
    The registers are limits of a thread: without one, the assembler takes more than it needs, or sets one itself for
    the sake of occupancy and spills for it.

    Raises:
        ValueError: ``overlap`` with ``pdl``, which needs shrink and expand one right after the other, or ``prefetch_b``
            without ``overlap``.
    """

    overlap: bool
    prefetch_b: bool
    pdl: bool
    splits: int
    block_k: int
    shrink_warps: int
    shrink_stages: int
    shrink_registers: int
    tokens_at_once: int
    block_o: int
    block_r: int
    expand_warps: int
    expand_registers: int

    def __post_init__(self) -> None:
        if self.overlap and self.pdl:
            raise ValueError("found overlap with pdl, expected one of the two")
        if self.prefetch_b and not self.overlap:
            raise ValueError("found prefetch_b without overlap, expected both")


@dataclass(frozen=True)
class Shape:
    """What a configuration is chosen by: tokens of the batch and the most tiles that they fall into, inputs and outputs
    of the layer on this GPU, tokens of a tile, ranks of a block of the shrink and of the expand, programs that share a
    tile's rows of A, and elements of B that are loaded at once; whether TP ranks exchange h, which is of the model's
    type then."""

    tokens: int
    tiles: int
    inputs: int
    outputs: int
    block_tokens: int
    shrink_rank: int
    row_programs: int
    expand_rank: int
    expand_width: int = 8
    exchanged: bool = False

    @property
    def blocks(self) -> tuple[int, ...]:
        """A configuration suits one size of tiles and blocks: with others it might run out of registers."""
        return (
            self.block_tokens, self.shrink_rank, self.row_programs, self.expand_rank, self.expand_width, self.exchanged
        )  # fmt: skip

    def distance(self, other: "Shape") -> float:
        """How far two shapes with the same blocks are apart: doubling a size is a step of one."""
        pairs = (self.tokens, other.tokens), (self.inputs, other.inputs), (self.outputs, other.outputs)
        return sum(abs(math.log2(mine / theirs)) for mine, theirs in pairs)


@dataclass(frozen=True)
class Configurations:
    """The configurations of one architecture: ``tuned`` ones where a shape is near enough, else the formula's.

    ``origin`` says where the tuned ones come from. ``deterministic``: a token's result does not depend on what else
    is in the batch (batch-invariant): tiles, splits and products are the same for every number of tokens.
    """

    capability: int
    origin: str = "by formula: not tuned"
    tuned: Mapping[Shape, Configuration] = field(default_factory=dict)
    deterministic: bool = False

    def block_tokens(self, decode: bool) -> int:
        """Tokens of a tile."""
        return DECODE_BLOCK_TOKENS if decode or self.deterministic else PREFILL_BLOCK_TOKENS

    def choose(self, shape: Shape) -> Configuration:
        """The tuned configuration of a shape less than one doubling away, else the formula's."""
        if not self.deterministic:
            near = [known for known in self.tuned if known.blocks == shape.blocks and shape.distance(known) < 1]
            if near:
                return self.tuned[min(near, key=shape.distance)]
        return by_formula(shape, self.capability, self.deterministic)

    def max_partial_tokens(self, max_tokens: int, block_tokens: int) -> int:
        """The most tokens times splits of any batch of up to ``max_tokens`` tokens, where it is split at all."""
        if self.deterministic:
            return max_tokens * _MAX_DETERMINISTIC_SPLITS
        # T tokens fall into T / block tiles or more, and there are as many programs as tiles times splits.
        most = min(max_tokens * _MAX_SPLITS, _SHRINK_PROGRAMS * block_tokens)
        tuned = (shape.tokens * 2 * chosen.splits for shape, chosen in self.tuned.items() if chosen.splits > 1)
        return max(most, max(tuned, default=0))


def by_formula(shape: Shape, capability: int, deterministic: bool = False) -> Configuration:
    """A configuration from the sizes alone, which `bdlora perf kernels --static` compares with SGLang's."""
    decode = shape.block_tokens == DECODE_BLOCK_TOKENS
    # All at once in one program: to add up the sums of several is three steps of the cache.
    deep = decode and shape.inputs <= _FEW_INPUTS and shape.shrink_rank <= 16
    if deterministic:
        splits = _power_of_two(shape.inputs // _DETERMINISTIC_SPLIT_INPUTS, _MAX_DETERMINISTIC_SPLITS)
    else:
        programs = shape.tiles * shape.row_programs
        most = min(_MAX_SPLITS, _power_of_two(shape.inputs // _MIN_SPLIT_INPUTS, _MAX_SPLITS))
        # Two programs of a large block of ranks are all that a multiprocessor has registers for: one wave of them.
        room = 2 * _gpu(capability)[0] if decode and shape.shrink_rank > 32 else _SHRINK_PROGRAMS
        splits = 1 if deep else _power_of_two(room // programs, most)
    return Configuration(
        overlap=decode,
        prefetch_b=decode and not deterministic and _worth_fetching(shape, capability),
        pdl=not decode and not shape.exchanged and capability >= 90,
        splits=splits,
        block_k=128 if decode else 64,
        shrink_warps=4,
        shrink_stages=8 if deep else 3 if decode else 4,
        shrink_registers=224 if not decode else 96 if shape.shrink_rank <= 32 else 184,
        expand_warps=4,
        **(_decode_expand if decode else _prefill_expand)(shape, capability),
    )


def _decode_expand(shape: Shape, capability: int) -> dict[str, int]:
    """Of large programs fewer fit at a time, but more outputs, which take fewer waves where there are many of them."""
    rank = shape.expand_rank
    wide = shape.outputs >= _MANY_OUTPUTS and rank <= 32
    hopper = 90 <= capability < 100
    # With fewer registers the assembler spills.
    if (rank <= 32 and not wide) or (rank <= 16 and hopper and shape.expand_width >= 4):
        registers = 96
    else:
        registers = 168 if rank > 16 and capability < 90 else 128
    return {"tokens_at_once": 8, "block_o": 256 if wide else 128, "block_r": rank, "expand_registers": registers}


def _prefill_expand(shape: Shape, capability: int) -> dict[str, int]:
    """Few large programs: what counts is how much of y is under way, and a wave waits for its loads."""
    return {
        # With more, the assembler spills where h has 16 bits.
        "tokens_at_once": 16 if shape.exchanged else 32,
        "block_o": 256 if capability >= 90 else 128,
        "block_r": min(shape.expand_rank, 32),
        "expand_registers": 168 if capability < 90 and shape.expand_rank <= 16 else 255,
    }


def _worth_fetching(shape: Shape, capability: int) -> bool:
    """Whether B is brought to the cache beside the base product: where it stays there, and is soon read.

    The product waits for memory, so that B's bytes delay it by as much as they take; they save the expand one trip.
    """
    _, cache_bytes, most_bytes = _gpu(capability)
    adapters = min(shape.tokens, shape.tiles - -(-shape.tokens // shape.block_tokens) + 1)
    b_bytes = _ELEMENT_BYTES * adapters * shape.expand_rank * shape.outputs
    return b_bytes <= most_bytes and _ELEMENT_BYTES * shape.inputs * shape.outputs + b_bytes <= cache_bytes


def _gpu(capability: int) -> tuple[int, int, int]:
    return _GPUS.get(capability, _GPUS[80])


def _power_of_two(number: int, most: int) -> int:
    """The largest power of two up to ``number`` and ``most``, at least 1."""
    return 1 << (max(1, min(number, most)).bit_length() - 1)


def parse_configurations(text: str) -> Configurations:
    """Read the JSON text of a configuration file."""
    content = json.loads(text)
    tuned = {Shape(**row["shape"]): Configuration(**row["configuration"]) for row in content.pop("configurations")}
    return Configurations(**content, tuned=tuned)


def format_configurations(configurations: Configurations) -> str:
    """The JSON text of a configuration file: one line a shape, sorted."""
    content: dict[str, Any] = {"capability": configurations.capability, "origin": configurations.origin}
    rows = [
        "    " + json.dumps({"shape": asdict(shape), "configuration": asdict(configuration)})
        for shape, configuration in sorted(
            configurations.tuned.items(), key=lambda item: tuple(asdict(item[0]).values())
        )
    ]
    head = json.dumps(content, indent=2).removesuffix("\n}")
    return head + ',\n  "configurations": [\n' + ",\n".join(rows) + "\n  ]\n}\n"


def _folder() -> Traversable:
    return files("bdlora_kernels").joinpath("launch_configurations")


@cache
def load_configurations(capability: int, deterministic: bool = False) -> Configurations:
    """Those of a compute capability: what was tuned on just this architecture, where there is a file."""
    file = _folder().joinpath(f"sm_{capability}.json")
    known = parse_configurations(file.read_text(encoding="utf-8")) if file.is_file() else Configurations(capability)
    return Configurations(known.capability, known.origin, known.tuned, deterministic)


@cache
def device_configurations(device: torch.device, deterministic: bool = False) -> Configurations:
    """The configurations for a GPU. On the CPU, where Triton interprets, those of the oldest architecture."""
    if device.type != "cuda":
        return load_configurations(ARCHITECTURES[0], deterministic)
    major, minor = torch.cuda.get_device_capability(device)
    return load_configurations(10 * major + minor, deterministic)
