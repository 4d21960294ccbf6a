"""Sums in a fixed order for loops that Numba compiles: sixteen numbers at a time, each lane added up on its own.

LLVM makes vectors of a plain loop too, as many as its registers allow: the order of a sum, and so its last bits, then
depends on what else the loop does and on the processor.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.datamodel import PrimitiveModel
from numba.core.extending import register_model
from numba.extending import intrinsic

# Two vectors of AVX2, so that four sums and what is multiplied have room in its sixteen registers.
LANES = 16

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_BITS = ir.VectorType(ir.IntType(32), LANES)


class _Lanes(types.Type):  # type: ignore[misc]
    """``LANES`` float32."""

    def __init__(self) -> None:
        super().__init__(name="Lanes")


_lanes = _Lanes()


@register_model(_Lanes)
class _LanesModel(PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)


@intrinsic  # type: ignore[untyped-decorator]
def zeros(_context: Any) -> Any:
    """Every lane zero."""

    def codegen(_context: Any, _builder: Any, _signature: Any, _arguments: Any) -> Any:
        return ir.Constant(_FLOATS, [0.0] * LANES)

    return _lanes(), codegen


@intrinsic  # type: ignore[untyped-decorator]
def load(_context: Any, array: Any, start: Any) -> Any:
    """``array[start : start + LANES]``, of float32, or of the bits of bfloat16 (unsigned) or of float16 (signed).

    It is not checked where the array ends.
    """
    dtype = array.dtype
    kinds = {types.float32: ir.FloatType(), types.uint16: ir.IntType(16), types.int16: ir.HalfType()}

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        kind = ir.VectorType(kinds[dtype], LANES)
        place = builder.bitcast(builder.gep(data, [arguments[1]]), kind.as_pointer())
        values = builder.load(place, align=dtype.bitwidth // 8)
        if dtype == types.float32:
            return values
        if dtype == types.int16:
            return builder.fpext(values, _FLOATS)
        upper = builder.shl(builder.zext(values, _BITS), ir.Constant(_BITS, [16] * LANES))
        return builder.bitcast(upper, _FLOATS)

    return _lanes(array, start), codegen


@intrinsic  # type: ignore[untyped-decorator]
def add_product(_context: Any, sums: Any, a: Any, b: Any) -> Any:
    """``sums + a * b``, rounded once where the processor can."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        product = builder.fmul(*arguments[1:], flags=("contract",))
        return builder.fadd(arguments[0], product, flags=("contract",))

    return _lanes(sums, a, b), codegen


@intrinsic  # type: ignore[untyped-decorator]
def total(_context: Any, sums: Any) -> Any:
    """All lanes added up: halves, halves of these, and so on."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        values, width = arguments[0], LANES
        while width > 1:
            width //= 2
            halves = [[first + lane for lane in range(width)] for first in (0, width)]
            masks = (ir.Constant(ir.VectorType(ir.IntType(32), width), half) for half in halves)
            values = builder.fadd(*(builder.shuffle_vector(values, values, mask) for mask in masks))
        return builder.extract_element(values, ir.Constant(ir.IntType(32), 0))

    return types.float32(sums), codegen
