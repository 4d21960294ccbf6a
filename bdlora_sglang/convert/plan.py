"""What a conversion knows before it reads any weight, and how it reads them module by module."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial, reduce
from threading import Lock
from typing import TypeVar

import torch

from bdlora_sglang.adapter import Adapter, BlockSide, LoRAModule
from bdlora_sglang.convert.allocation import ModuleCost, module_cost
from bdlora_sglang.convert.blocks import Block, read_blocks, regroup
from bdlora_sglang.convert.options import DTYPES, ConvertOptions
from bdlora_sglang.convert.sides import choose_sides
from bdlora_sglang.errors import AdapterError, BDLoRAError

Item = TypeVar("Item")
Result = TypeVar("Result")

# Called with the steps done and their total; a step is one module, in one of the passes over the adapter.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """The sides, types and device of one conversion.

    ``dtype`` is the result's, ``compute_dtype`` that of the decompositions.
    """

    adapter: Adapter
    sides: Mapping[str, BlockSide]
    nblocks: int
    dtype: torch.dtype
    compute_dtype: torch.dtype
    device: torch.device
    # The checkpoint is one file with one map; threads take turns at it.
    _reading: Lock = field(default_factory=Lock, repr=False)

    @classmethod
    def make(cls, adapter: Adapter, options: ConvertOptions) -> "Plan":
        """Raises `BDLoRAError` where the options and the adapter do not go together."""
        stored = [adapter.checkpoint.dtype(t) for m in adapter.modules.values() for t in (m.tensor_a, m.tensor_b)]
        widest = reduce(torch.promote_types, stored)
        wide = widest is torch.float64 or options.calibration is not None
        if options.nblocks > 1 and (embedding := next((m for m in adapter.modules.values() if m.is_embedding), None)):
            raise AdapterError(
                adapter.checkpoint.source,
                f"module '{embedding.name}'",
                "LoRA on an embedding",
                "on linear modules alone: PEFT has no BD-LoRA with embeddings",
            )
        sides = _sides(adapter, options)
        for module in adapter.modules.values():
            _check_divides(adapter, module, sides[module.name], options.nblocks)
        return cls(
            adapter=adapter,
            sides=sides,
            nblocks=options.nblocks,
            dtype=DTYPES[options.dtype] if options.dtype else widest,
            compute_dtype=DTYPES[options.compute_dtype or ("float64" if wide else "float32")],
            device=torch.device(options.device),
        )

    def nblocks_of(self, module: LoRAModule) -> int:
        return 1 if self.sides[module.name] is BlockSide.NONE else self.nblocks

    @property
    def converted(self) -> list[LoRAModule]:
        """The modules that get blocks; those that stay plain are copied."""
        return [m for m in self.adapter.modules.values() if self.sides[m.name] is not BlockSide.NONE]

    @property
    def plain_parameters(self) -> int:
        return self.adapter.num_parameters - sum(module.num_parameters for module in self.converted)

    def costs(self) -> dict[str, ModuleCost]:
        """Of the converted modules, by name."""
        return {m.name: module_cost(m, self.sides[m.name], self.nblocks) for m in self.converted}

    def read(self, module: LoRAModule) -> list[Block]:
        """The module's delta in the new blocks, exact, in the stored type."""
        with self._reading:
            blocks = read_blocks(self.adapter, module)
        return regroup(blocks, self.sides[module.name], self.nblocks_of(module))

    def for_computing(self, blocks: Iterable[Block]) -> list[Block]:
        """The blocks in the computing type on the device; a factor that blocks share stays one tensor."""
        moved: dict[tuple[int, ...], torch.Tensor] = {}

        def move(tensor: torch.Tensor) -> torch.Tensor:
            key = (tensor.data_ptr(), *tensor.shape, *tensor.stride())
            if key not in moved:
                moved[key] = tensor.to(self.device, self.compute_dtype)
            return moved[key]

        return [Block(move(block.b), move(block.a)) for block in blocks]


def _sides(adapter: Adapter, options: ConvertOptions) -> dict[str, BlockSide]:
    """The sides that a BD-LoRA source has, and for a plain one those that the options or the table give."""
    given = options.target_modules_bd_a is not None or options.target_modules_bd_b is not None
    if adapter.kind == "BD-LoRA":
        if given:
            raise BDLoRAError(
                f"--target-modules-bd-a, --target-modules-bd-b: found a BD-LoRA source ({adapter.config.source}), "
                "which says its own sides, expected a plain LoRA"
            )
        return {module.name: module.side for module in adapter.modules.values()}
    if options.nblocks == 1 and not given:
        return dict.fromkeys(adapter.modules, BlockSide.B)  # one block: either side is the same
    return choose_sides(
        adapter.modules,
        options.target_modules_bd_a,
        options.target_modules_bd_b,
        options.keep_plain,
    )


def _check_divides(adapter: Adapter, module: LoRAModule, side: BlockSide, nblocks: int) -> None:
    size, what = (module.in_features, "input") if side is BlockSide.A else (module.out_features, "output")
    if side is not BlockSide.NONE and size % nblocks:
        raise AdapterError(
            adapter.checkpoint.source,
            f"module '{module.name}' ({side.value})",
            f"{size} {what} features",
            f"a multiple of --nblocks {nblocks}",
        )


class Steps:
    """Counts what is done of what is expected, and tells ``progress``."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def step(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


def in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int,
    steps: Steps,
) -> Iterator[tuple[Item, Result]]:
    """``(item, function(item))`` in the order of the items, worked on by ``threads`` threads, few of them ahead.

    Each thread computes alone, so that the number of threads does not change a bit of the results.
    """
    before = torch.get_num_threads()
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    pool = ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1))
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > threads:
                done, future = waiting.popleft()
                yield done, future.result()
                steps.step()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
            steps.step()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
