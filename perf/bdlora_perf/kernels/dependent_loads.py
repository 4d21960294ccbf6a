"""How many loads must follow each other before a kernel's first product, read from its machine code.

A warp issues its instructions in order, and waits where one uses what a load has not brought yet. The instructions are
walked in that way, along the branches, up to the first product; of several ways there the one that waits least counts:
the others are for odd sizes. A load finds in the first-level cache what an earlier, finished one through the same
pointer has brought; else it comes from the second level, or from memory where the pointer is one of ``cold``.
"""

import re
from collections.abc import Iterator, Mapping
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


@dataclass(frozen=True)
class Chain:
    """Loads one after the other, by where they find what they read."""

    l1: int = 0
    l2: int = 0
    memory: int = 0

    @property
    def weight(self) -> float:
        """For which of two chains is longer: about microseconds."""
        return 0.02 * self.l1 + 0.25 * self.l2 + 0.65 * self.memory

    @property
    def loads(self) -> int:
        """Without those that the first level answers."""
        return self.l2 + self.memory


@dataclass(frozen=True)
class _Instruction:
    address: int
    opcode: str
    operands: str
    guard: str

    @property
    def registers(self) -> list[str]:
        return re.findall(r"\bU?[RP]\d+\b", f"{self.guard} {self.operands}")


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
        if ready.weight > self.now.weight:
            self.now = ready


@cache
def loads_before_product(code: MachineCode, cold: frozenset[str]) -> Chain:
    """The chain up to the operands of the first product; raises ValueError where there is none."""
    instructions = list(_instructions(code.sass))
    places = {instruction.address: i for i, instruction in enumerate(instructions)}
    parameters = _parameters(code)
    products = _PRODUCTS if any(i.opcode.startswith(_PRODUCTS) for i in instructions) else _SCALAR_PRODUCTS
    found: list[Chain] = []
    ways = [_Warp(0)]
    visited = 0
    while ways and visited < _MOST_WAYS:
        warp = ways.pop()
        visited += 1
        while warp.place < len(instructions):
            instruction = instructions[warp.place]
            mentioned = instruction.registers
            for name in mentioned:
                if name in warp.pending:
                    warp.wait(warp.pending.pop(name))
            if instruction.opcode.startswith(products) and warp.now != Chain():
                found.append(warp.now)
                break
            if instruction.opcode == "EXIT" and not instruction.guard:
                break
            if instruction.opcode.startswith("BRA"):
                target = places.get(int(re.findall(r"0x([0-9a-f]+)", instruction.operands)[-1], 16), 0)
                if target > warp.place:
                    if not instruction.guard and "P" not in instruction.operands:
                        warp.place = target
                        continue
                    ways.append(warp.fork(target))
                elif not instruction.guard:
                    break
            _step(warp, instruction, parameters, cold)
            warp.place += 1
    if not found:
        raise ValueError(f"{code.name}: found no product, expected one")
    return min(found, key=lambda chain: chain.weight)


def _step(warp: _Warp, instruction: _Instruction, parameters: Mapping[int, str], cold: frozenset[str]) -> None:
    opcode, registers = instruction.opcode, re.findall(r"\bU?R\d+\b", instruction.operands)
    if opcode.startswith(("LDG", "LD.E")) and not opcode.startswith("LDGDEPBAR"):
        address = re.search(r"\[(R\d+)(?:\.64)?[^\]]*\]\s*(?:,|$|\s)", instruction.operands.rpartition("desc")[2] or "")
        names = re.findall(r"\[(R\d+)\.64", instruction.operands) or ([address[1]] if address else [])
        # A copy to shared memory names the target first.
        pointers = frozenset().union(*(warp.origin.get(name, frozenset()) for name in names[-1:]))
        ready = _arrival(warp, pointers, cold, strong="STRONG" in opcode)
        if opcode.startswith("LDGSTS"):
            warp.copies = max(warp.copies, ready, key=lambda chain: chain.weight)
        elif registers:
            for i in range(4 if ".128" in opcode else 2 if ".64" in opcode else 1):
                name = f"R{int(registers[0][1:]) + i}"
                warp.pending[name], warp.origin[name] = ready, frozenset()
    elif opcode.startswith(("DEPBAR", "SYNCS", "CGABAR")):
        warp.wait(warp.copies)
    elif registers and not opcode.startswith(("ST", "BAR", "RED", "ATOM")):
        used = frozenset().union(*(warp.origin.get(name, frozenset()) for name in registers[1:]))
        used |= {
            parameters[offset]
            for offset in (int(text, 16) for text in re.findall(r"c\[0x0\]\[0x([0-9a-f]+)\]", instruction.operands))
            if offset in parameters
        }
        kind, number = re.match(r"(U?R)(\d+)", registers[0]).groups()  # type: ignore[union-attr]
        wide = 4 if ".128" in opcode else 2 if "WIDE" in opcode or ".64" in opcode else 1
        # An instruction that may be skipped leaves the old value as the other possibility.
        old = warp.origin.get(registers[0], frozenset()) if instruction.guard else frozenset()
        for i in range(wide):
            inner = used if i < 2 else frozenset(_next_pointers(instruction.operands, parameters))
            warp.origin[f"{kind}{int(number) + i}"] = inner | old


def _next_pointers(operands: str, parameters: Mapping[int, str]) -> Iterator[str]:
    """The parameter 8 bytes behind the one that a 16-byte load of constants begins with."""
    for text in re.findall(r"c\[0x0\]\[0x([0-9a-f]+)\]", operands):
        if int(text, 16) + 8 in parameters:
            yield parameters[int(text, 16) + 8]


def _arrival(warp: _Warp, pointers: frozenset[str], cold: frozenset[str], strong: bool) -> Chain:
    pointer, now = "+".join(sorted(pointers)), warp.now
    before = warp.finished.get(pointer)
    if pointer and before is not None and before.weight <= now.weight and not strong:
        return replace(now, l1=now.l1 + 1)
    ready = replace(now, memory=now.memory + 1) if pointers & cold else replace(now, l2=now.l2 + 1)
    warp.finished.setdefault(pointer, ready)
    return ready


def _instructions(sass: str) -> Iterator[_Instruction]:
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z][\w.]*)\s*([^;]*);"
    for address, guard, opcode, operands in re.findall(pattern, sass):
        yield _Instruction(int(address, 16), opcode, operands, guard)


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
