"""How many loads must follow each other before a kernel's first product, read from its machine code.

A warp issues its instructions in order, and waits where one uses what a load has not brought yet. The instructions are
walked in that way, along the branches, up to the first product; of several ways there the one that waits least counts:
the others are for odd sizes. A load finds in the first-level cache what an earlier, finished one through the same
pointer has brought; else it comes from the second level, or from memory where the pointer is one of ``cold``.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

from bdlora_perf.kernels.absent_gpu import MachineCode

# Where a kernel's parameters begin in the constant bank, by the architecture in the SASS.
_FIRST_PARAMETER = {"SM80": 0x160, "SM90": 0x210, "SM100": 0x380}
_SIZES = {"i1": 1, "i8": 1, "i16": 2, "i64": 8, "u64": 8, "fp64": 8}
_PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA", "IMMA", "DMMA")
# Without tensor cores a product is a multiply and add of loaded numbers.
_SCALAR_PRODUCTS = ("FFMA", "FMUL", "HFMA2")
_MOST_WAYS = 4096
_INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<guard>@!?U?P\w+)?\s*(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>[^;]*);"
)


@dataclass(frozen=True)
class Chain:
    """Loads one after the other, by where they find what they read."""

    l1: int = 0
    l2: int = 0
    memory: int = 0

    def us(self, l1: float = 0.02, l2: float = 0.25, memory: float = 0.65) -> float:
        """Microseconds with these of a read in each level; about those that they take, to say which chain is longer."""
        return l1 * self.l1 + l2 * self.l2 + memory * self.memory

    @property
    def loads(self) -> int:
        """Without those that the first level answers."""
        return self.l2 + self.memory


@dataclass
class _Warp:
    """A warp on its way: when it is there, what it waits for, and which parameters a register's value comes from."""

    place: int
    now: Chain = Chain()
    pending: dict[str, Chain] = field(default_factory=dict)
    copies: Chain = Chain()
    origin: dict[str, frozenset[str]] = field(default_factory=dict)
    finished: dict[str, Chain] = field(default_factory=dict)

    def fork(self, place: int) -> "_Warp":
        return replace(
            self, place=place, pending=dict(self.pending), origin=dict(self.origin), finished=dict(self.finished)
        )

    def wait(self, ready: Chain) -> None:
        self.now = max(self.now, ready, key=Chain.us)

    def origins(self, registers: Iterable[str]) -> frozenset[str]:
        return frozenset().union(*(self.origin.get(name, ()) for name in registers))


@cache
def loads_before_product(code: MachineCode, cold: frozenset[str]) -> Chain:
    """The chain up to the operands of the first product; raises ValueError where there is none."""
    instructions = list(_INSTRUCTION.finditer(code.sass))
    places = {int(instruction["address"], 16): i for i, instruction in enumerate(instructions)}
    parameters = _parameters(code)
    products = _PRODUCTS if any(i["opcode"].startswith(_PRODUCTS) for i in instructions) else _SCALAR_PRODUCTS
    found: list[Chain] = []
    ways = [_Warp(0)]
    visited = 0
    while ways and visited < _MOST_WAYS:
        warp = ways.pop()
        visited += 1
        while warp.place < len(instructions):
            guard, opcode, operands = instructions[warp.place].group("guard", "opcode", "operands")
            for name in re.findall(r"\bU?[RP]\d+\b", f"{guard} {operands}"):
                if name in warp.pending:
                    warp.wait(warp.pending.pop(name))
            if opcode.startswith(products) and warp.now != Chain():
                found.append(warp.now)
                break
            if opcode == "EXIT" and not guard:
                break
            if opcode.startswith("BRA"):
                target = places.get(int(re.findall(r"0x([0-9a-f]+)", operands)[-1], 16), 0)
                if target > warp.place:
                    if not guard and "P" not in operands:
                        warp.place = target
                        continue
                    ways.append(warp.fork(target))
                elif not guard:
                    break
            _step(warp, opcode, operands, bool(guard), parameters, cold)
            warp.place += 1
    if not found:
        raise ValueError(f"{code.name}: found no product, expected one")
    return min(found, key=Chain.us)


def _step(
    warp: _Warp, opcode: str, operands: str, guarded: bool, parameters: Mapping[int, str], cold: frozenset[str]
) -> None:
    registers = re.findall(r"\bU?R\d+\b", operands)
    if opcode.startswith(("DEPBAR", "SYNCS", "CGABAR")):
        warp.wait(warp.copies)
        return
    is_load = opcode.startswith(("LDG", "LD.E")) and not opcode.startswith("LDGDEPBAR")
    if not registers or (not is_load and opcode.startswith(("ST", "BAR", "RED", "ATOM"))):
        return
    width = 4 if ".128" in opcode else 2 if "WIDE" in opcode or ".64" in opcode else 1
    kind, first = re.match(r"(U?R)(\d+)", registers[0]).groups()  # type: ignore[union-attr]
    targets = [f"{kind}{int(first) + i}" for i in range(width)]
    if is_load:
        address = re.search(r"\[(R\d+)(?:\.64)?[^\]]*\]\s*(?:,|$|\s)", operands.rpartition("desc")[2])
        names = re.findall(r"\[(R\d+)\.64", operands) or ([address[1]] if address else [])
        # A copy to shared memory names the target first.
        ready = _arrival(warp, warp.origins(names[-1:]), cold, strong="STRONG" in opcode)
        if opcode.startswith("LDGSTS"):
            warp.copies = max(warp.copies, ready, key=Chain.us)
            return
        warp.pending |= dict.fromkeys(targets, ready)
        warp.origin |= dict.fromkeys(targets, frozenset())
        return
    constants = [int(text, 16) for text in re.findall(r"c\[0x0\]\[0x([0-9a-f]+)\]", operands)]
    used = warp.origins(registers[1:]) | {parameters[place] for place in constants if place in parameters}
    # A load of 16 bytes of constants brings two parameters.
    next_used = frozenset(parameters[place + 8] for place in constants if place + 8 in parameters)
    # An instruction that may be skipped leaves the old value as the other possibility.
    old = warp.origins(registers[:1]) if guarded else frozenset()
    for i, target in enumerate(targets):
        warp.origin[target] = (used if i < 2 else next_used) | old


def _arrival(warp: _Warp, pointers: frozenset[str], cold: frozenset[str], strong: bool) -> Chain:
    pointer, now = "+".join(sorted(pointers)), warp.now
    before = warp.finished.get(pointer)
    if pointer and before is not None and before.us() <= now.us() and not strong:
        return replace(now, l1=now.l1 + 1)
    ready = replace(now, memory=now.memory + 1) if pointers & cold else replace(now, l2=now.l2 + 1)
    warp.finished.setdefault(pointer, ready)
    return ready


def _parameters(code: MachineCode) -> dict[int, str]:
    """Pointers by their place in the constant bank."""
    found = re.search(r"EF_CUDA_(SM\d+)", code.sass)
    offset = _FIRST_PARAMETER[found[1]] if found else 0
    places = {}
    for name, kind in code.parameters:
        size = 8 if kind.startswith("*") else _SIZES.get(kind, 4)
        offset = -(-offset // size) * size
        if kind.startswith("*"):
            places[offset] = name
        offset += size
    return places
