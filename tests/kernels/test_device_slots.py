"""A slot of the device is one buffer: what is copied to fill it, and that every layer finds its factors there."""

import gc
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bdlora_kernels import (
    DeviceSlots,
    EagerSlots,
    HostBlock,
    LayerPlan,
    PackedAdapter,
    SlotSize,
    UnpackedSlice,
    pack_adapter,
    plan_layer,
)
from bdlora_kernels.layout import ALIGNMENT

CPU = torch.device("cpu")
LAYERS = 80
KINDS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
NAMES = tuple(f"model.layers.{i}.{kind}" for i in range(LAYERS) for kind in KINDS)
SLOTS = 3
Layers = Mapping[str, Sequence[UnpackedSlice]]


class Counted(TorchDispatchMode):
    """Counts copies, and allocations of pinned memory, which are made of ordinary memory where there is no GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = self.pinned = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        self.pinned += bool(kwargs.pop("pin_memory", False))
        self.copies += func is torch.ops.aten.copy_.default
        return func(*args, **kwargs)


def random_layers(rank: int, names: Sequence[str], seed: int, inputs: int = 7, outputs: int = 5) -> Layers:
    """Two slices a layer of the qkv kind, one of the others; sizes are odd, so that nothing is aligned by luck."""
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, list[UnpackedSlice]] = {}
    for name in names:
        count = 2 if "qkv" in name else 1
        layers[name] = [
            UnpackedSlice(
                torch.randn(rank, inputs, generator=generator),
                torch.randn(outputs, rank, generator=generator),
                0,
                index * outputs,
                seed + 0.5,
            )
            for index in range(count)
        ]
    return layers


def plans(layers: Layers) -> dict[str, LayerPlan]:
    return {name: plan_layer([part.planned() for part in parts]) for name, parts in layers.items()}


def sizes(*adapters: Layers) -> dict[str, SlotSize]:
    found = dict.fromkeys(NAMES, SlotSize())
    for layers in adapters:
        for name, plan in plans(layers).items():
            found[name] = found[name].max(SlotSize.of(plan))
    return found


def staged(slots: DeviceSlots | EagerSlots, layers: Layers) -> PackedAdapter:
    adapter = pack_adapter(plans(layers), slots.host_block)
    slots.describe(adapter)
    return adapter


def assert_holds(slots: DeviceSlots, slot: int, layers: Layers) -> None:
    """Through its tables, as the kernels do: each layer's A, B and scaling, and nothing for the other layers."""
    for name, factors in slots.layers.items():
        shrink = factors.tables.shrink.entries_SEF[slot].tolist()
        expand = factors.tables.expand.entries_SEF[slot]
        parts = layers.get(name, ())
        assert expand[0, 0] == len(parts)
        assert shrink[0][0] == bool(parts)
        if not parts:
            continue
        _, input_size, rank, a_offset, _ = shrink[1][:5]
        a = factors.a_SE[slot, a_offset : a_offset + rank * input_size].view(rank, input_size)
        assert torch.equal(a, torch.cat([part.a for part in parts]))
        for entry, part in zip(expand[1:], parts, strict=False):
            output_start, output_size, own_rank, b_offset, _ = entry[:5].tolist()
            b = factors.b_SE[slot, b_offset : b_offset + output_size * own_rank].view(output_size, own_rank)
            assert torch.equal(b, part.b) and output_start == part.output_start
            assert entry[5].view(torch.float32) == part.scaling


def test_two_copies_from_one_pinned_block() -> None:
    """Whatever the number of layers: before, 640 copies of factors and 1280 of tables, of as many pinned blocks."""
    layers = random_layers(3, NAMES, seed=0)
    slots = DeviceSlots(SLOTS, sizes(layers), torch.float32, CPU, pin_memory=True)
    with Counted() as counted:
        adapter = staged(slots, layers)
    assert counted.pinned == 1
    with Counted() as counted:
        slots.write(1, adapter)
    assert (counted.copies, counted.pinned) == (2, 0)
    with Counted() as counted:
        slots.clear(1)
    assert counted.copies == 0
    assert_holds(slots, 1, layers)


def test_a_slot_is_overwritten_whatever_it_held() -> None:
    """By a smaller adapter, by one of fewer layers, and by one of others; the neighbours stay as they are."""
    whole = random_layers(4, NAMES, seed=1)
    others = [
        random_layers(2, NAMES, seed=2),
        random_layers(4, NAMES[1::4], seed=3),
        random_layers(1, NAMES[: 2 * LAYERS], seed=4),
    ]
    slots = DeviceSlots(SLOTS, sizes(whole, *others), torch.float32, CPU, pin_memory=False)
    for slot in range(SLOTS):
        slots.write(slot, staged(slots, whole))
    for layers in others:
        slots.write(1, staged(slots, layers))
        assert_holds(slots, 1, layers)
        for neighbour in (0, 2):
            assert_holds(slots, neighbour, whole)


def test_all_layers_are_views_of_two_tensors() -> None:
    layers = random_layers(3, NAMES, seed=0)
    slots = DeviceSlots(SLOTS, sizes(layers), torch.bfloat16, CPU, pin_memory=False)
    factors = {layer.a_SE.untyped_storage().data_ptr() for layer in slots.layers.values()}
    factors |= {layer.b_SE.untyped_storage().data_ptr() for layer in slots.layers.values()}
    tables = [
        table.entries_SEF for layer in slots.layers.values() for table in (layer.tables.shrink, layer.tables.expand)
    ]
    assert len(factors) == len({table.untyped_storage().data_ptr() for table in tables}) == 1
    for layer in slots.layers.values():
        assert layer.a_SE.stride(0) % ALIGNMENT == layer.b_SE.stride(0) % ALIGNMENT == 0
    for table in tables:
        assert table.stride(0) % 16 == 0 and table.data_ptr() % 16 == 0, "Triton loads 16 bytes at once"
    adapter = staged(slots, layers)
    for layer in adapter.layers.values():
        for part in layer.slices_in_block():
            assert part.b_offset % ALIGNMENT == 0
        assert layer.slices_in_block()[0].a_offset % ALIGNMENT == 0


def test_slots_are_as_large_as_their_layers() -> None:
    """A layer that is wider than others of its name does not widen them, and one that nobody touches takes nothing."""
    narrow, wide = random_layers(3, NAMES[:8], 0), random_layers(3, NAMES[8:12], 0, inputs=70, outputs=50)
    slots = DeviceSlots(SLOTS, sizes({**narrow, **wide}), torch.float32, CPU, pin_memory=False)
    assert set(slots.layers) == set(NAMES[:12])
    elements = sum(plan.a_elements + plan.b_elements for plan in plans({**narrow, **wide}).values())
    adapter = staged(slots, {**narrow, **wide})
    assert adapter.num_bytes == 4 * elements
    assert slots.slot_bytes == 4 * elements + adapter.block.table_F.nbytes


@pytest.mark.parametrize("slots_class", [DeviceSlots, EagerSlots])
def test_more_ranks_than_there_is_room_for(slots_class: Any) -> None:
    small, large = random_layers(2, NAMES[:1], 0), random_layers(3, NAMES[:1], 0)
    slots = slots_class(SLOTS, sizes(small), torch.float32, CPU, False)
    adapter = pack_adapter(plans(large), slots.host_block)
    if slots_class is DeviceSlots:
        with pytest.raises(ValueError, match="found 6 ranks together, expected at most 4"):
            slots.describe(adapter)


def test_kernels_are_chosen_by_usual_adapters() -> None:
    """Slots for rank 64 in qkv, three times, and adapters of rank 8: one block of 32 rows, not three of 64."""
    room, usual = SlotSize(1 << 16, 1 << 16, 192, 64, 192), SlotSize(1 << 12, 1 << 12, 24, 8, 24)
    for size, blocks, programs in ((room, (64, 64), 3), (room.made_for(usual), (32, 16), 1)):
        tables = DeviceSlots(1, {"qkv": size}, torch.float32, CPU, pin_memory=False).layers["qkv"].tables
        assert (tables.shrink.block_rank, tables.expand.block_rank) == blocks
        assert tables.shrink.row_programs == programs
        assert tables.h_size == 192 and size.fits(room), "larger adapters are served all the same"
    assert room.made_for(SlotSize()) == room


def test_host_memory_goes_with_its_adapter() -> None:
    """Also while a slot holds it: nothing is left of an adapter that was unloaded."""
    layers = random_layers(3, NAMES[:4], seed=0)
    slots = DeviceSlots(SLOTS, sizes(layers), torch.float32, CPU, pin_memory=False)
    adapter = staged(slots, layers)
    slots.write(0, adapter)
    memory = weakref.ref(adapter.block.factors_E)
    del adapter
    gc.collect()
    assert memory() is None
    assert_holds(slots, 0, layers)


def test_a_slot_beyond_int32_is_refused() -> None:
    with pytest.raises(ValueError, match="found a slot of 3221225472 elements, expected at most 2147483647"):
        DeviceSlots(1, {"a": SlotSize(3 << 30, 0, 1, 1)}, torch.float32, torch.device("meta"), pin_memory=False)


def test_an_adapter_moves_to_another_block() -> None:
    """As the first adapters do, which are read before the pool is measured."""
    layers = random_layers(3, NAMES[:6], seed=5)
    slots = DeviceSlots(SLOTS, sizes(layers), torch.float32, CPU, pin_memory=False)
    read = pack_adapter(plans(layers), lambda elements: HostBlock.allocate(elements, 0, torch.float32, False))
    moved = read.moved_to(slots.host_block(len(read.block.factors_E)))
    slots.describe(moved)
    read.block.factors_E.fill_(float("nan"))
    slots.write(0, moved)
    assert_holds(slots, 0, layers)
