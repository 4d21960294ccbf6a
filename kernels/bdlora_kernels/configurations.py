"""Launch configurations: data, one file an architecture, looked up by the shape of a launch."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.abc import Traversable
from importlib.resources import files
from typing import Any

import torch

# Beyond so many tokens a batch is a prefill: its tiles of tokens are larger.
DECODE_TOKENS = 256


@dataclass(frozen=True)
class Configuration:
    """How the kernels are launched.

    ``fused``: shrink and expand in one launch; else two, and with ``pdl`` (programmatic dependent launch, from sm_90
    on) the second is set up while the first runs. ``splits``: parts of the inputs that different programs sum up.
    A fused launch takes warps and stages of the shrink. ``max_registers`` of a thread: without a limit, the assembler
    sets one itself for the sake of occupancy, and spills a few bytes for it. ``overlap``: the shrink runs on a second
    stream beside the base layer's own product, which in decode is bound by memory and leaves multiprocessors idle.

    Raises:
        ValueError: ``overlap`` with ``fused`` or ``pdl``, which need shrink and expand one right after the other.
    """

    fused: bool
    pdl: bool
    overlap: bool
    splits: int
    block_k: int
    shrink_warps: int
    shrink_stages: int
    block_o: int
    expand_warps: int
    max_registers: int

    def __post_init__(self) -> None:
        if self.overlap and (self.fused or self.pdl):
            raise ValueError(f"found overlap with fused={self.fused}, pdl={self.pdl}, expected neither of the two")

    def overlapping(self) -> "Configuration":
        """The same, with the shrink beside the base layer."""
        return replace(self, fused=False, pdl=False, overlap=True)


@dataclass(frozen=True)
class Shape:
    """What a configuration is chosen by: tokens of the batch, inputs and outputs of the layer on this GPU, tokens of a
    tile, and ranks of a block of the shrink."""

    tokens: int
    inputs: int
    outputs: int
    block_tokens: int
    block_rank: int

    @property
    def blocks(self) -> tuple[int, int]:
        """A configuration suits one size of tiles and blocks: with others it might run out of registers."""
        return self.block_tokens, self.block_rank

    def distance(self, other: "Shape") -> float:
        """How far two shapes with the same blocks are apart: doubling a size is a step of one."""
        return sum(
            abs(math.log2(mine / theirs))
            for mine, theirs in (
                (self.tokens, other.tokens),
                (self.inputs, other.inputs),
                (self.outputs, other.outputs),
            )
        )


@dataclass(frozen=True)
class Configurations:
    """The configurations of one architecture, such as ``sm_90``.

    ``origin`` says where they come from: a measurement, or "not tuned yet: reasoned". ``decode_block_tokens`` and
    ``prefill_block_tokens`` are the tokens of a tile, which all layers of a batch share.
    """

    architecture: str
    origin: str
    decode_block_tokens: int
    prefill_block_tokens: int
    by_shape: Mapping[Shape, Configuration]

    def block_tokens(self, max_tokens: int) -> int:
        """Tokens of a tile in batches of up to ``max_tokens`` tokens."""
        return self.decode_block_tokens if max_tokens <= DECODE_TOKENS else self.prefill_block_tokens

    def max_splits(self, block_tokens: int) -> int:
        """The most parts that a launch with tiles of ``block_tokens`` tokens splits the inputs into."""
        return max(chosen.splits for shape, chosen in self.by_shape.items() if shape.block_tokens == block_tokens)

    def nearest(self, shape: Shape) -> Configuration:
        """The configuration of the nearest shape with the same blocks; between equals, the first in the file."""
        return self.by_shape[
            min((known for known in self.by_shape if known.blocks == shape.blocks), key=shape.distance)
        ]


def parse_configurations(text: str) -> Configurations:
    """Read the JSON text of a configuration file."""
    content = json.loads(text)
    by_shape = {Shape(**row["shape"]): Configuration(**row["configuration"]) for row in content.pop("configurations")}
    return Configurations(**content, by_shape=by_shape)


def format_configurations(configurations: Configurations) -> str:
    """The JSON text of a configuration file: one line a shape, sorted."""
    content: dict[str, Any] = {name: value for name, value in vars(configurations).items() if name != "by_shape"}
    head = json.dumps(content, indent=2).removesuffix("\n}")
    rows = [
        "    " + json.dumps({"shape": asdict(shape), "configuration": asdict(configuration)})
        for shape, configuration in sorted(
            configurations.by_shape.items(), key=lambda item: tuple(asdict(item[0]).values())
        )
    ]
    return head + ',\n  "configurations": [\n' + ",\n".join(rows) + "\n  ]\n}\n"


def _folder() -> Traversable:
    return files("bdlora_kernels").joinpath("launch_configurations")


@cache
def known_architectures() -> tuple[int, ...]:
    """The compute capabilities with a file, such as 90 for sm_90, in order."""
    names = [file.name for file in _folder().iterdir()]
    return tuple(sorted(int(name[3:-5]) for name in names if name.startswith("sm_") and name.endswith(".json")))


@cache
def load_configurations(capability: int) -> Configurations:
    """The configurations of the newest known architecture that is no newer than compute capability ``capability``."""
    older = [known for known in known_architectures() if known <= capability]
    name = f"sm_{older[-1] if older else known_architectures()[0]}.json"
    return parse_configurations(_folder().joinpath(name).read_text(encoding="utf-8"))


@cache
def device_configurations(device: torch.device) -> Configurations:
    """The configurations for a GPU. On the CPU, where Triton interprets, those of the oldest architecture."""
    if device.type != "cuda":
        return load_configurations(known_architectures()[0])
    major, minor = torch.cuda.get_device_capability(device)
    return load_configurations(10 * major + minor)


@cache
def choose_configuration(device: torch.device, shape: Shape) -> Configuration:
    """The configuration for a launch of this shape."""
    return device_configurations(device).nearest(shape)
