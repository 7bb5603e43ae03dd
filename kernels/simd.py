"""A vector of 16 floats for numba functions, so that fast loops say what they do instead of hoping for a vectoriser.

`load`, `store`, `splat`, `fma` and so on are numba intrinsics on LLVM's <16 x float>: one AVX-512 register, two AVX2
registers, four of NEON. Every operation is defined lane by lane, so results do not depend on how it is lowered
(but for a fused or unfused multiply-add, which is the machine's). bfloat16 is read as uint16 and widened by a shift.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16
CACHE_LINE_BYTES = 64

_F32 = ir.FloatType()
_I32 = ir.IntType(32)
_VECTOR = ir.VectorType(_F32, LANES)
_INTS = ir.VectorType(_I32, LANES)
_SHORTS = ir.VectorType(ir.IntType(16), LANES)

Generator = Callable[[Any, Any, Any, Any], Any]
_insert_function: Any = cgutils.get_or_insert_function


def _typed(typing: Callable[..., tuple[Any, Generator]]) -> Any:
    """Make an intrinsic; its callers are jitted functions, which see it without the typing context."""
    return intrinsic(typing)


class VectorType(types.Type):
    """Numba's name for the vector."""

    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, frontend: Any) -> None:
        super().__init__(manager, frontend, _VECTOR)  # type: ignore[no-untyped-call]


Vector = VectorType()
_FOUR: Any = types.UniTuple(Vector, 4)  # type: ignore[no-untyped-call]


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_VECTOR, [value] * LANES)


def _integers(value: int) -> ir.Constant:
    return ir.Constant(_INTS, [value] * LANES)


def _call(builder: Any, name: str, *operands: Any) -> Any:
    """Call LLVM's elementwise intrinsic `name` on vectors."""
    signature = ir.FunctionType(_VECTOR, [_VECTOR] * len(operands))
    function = _insert_function(builder.module, signature, f"llvm.{name}.v{LANES}f32")
    return builder.call(function, operands)


def _element(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Address of element `index`, in memory order, of a dense array of any shape; unchecked."""
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def _unary(emit: Callable[[Any, Any], Any]) -> Any:
    @_typed
    def operation(_context: Any, x: Any) -> tuple[Any, Generator]:
        return Vector(Vector), lambda _context, builder, _signature, arguments: emit(builder, *arguments)

    return operation


def _binary(emit: Callable[[Any, Any, Any], Any]) -> Any:
    @_typed
    def operation(_context: Any, x: Any, y: Any) -> tuple[Any, Generator]:
        return Vector(Vector, Vector), lambda _context, builder, _signature, arguments: emit(builder, *arguments)

    return operation


@_typed
def load(_context: Any, array: Any, index: Any) -> tuple[Any, Generator]:
    """Read array[index : index + 16] of float32, or of bfloat16 kept as uint16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _element(context, builder, signature.args[0], *arguments)
        if array.dtype == types.float32:
            return builder.load(builder.bitcast(address, _VECTOR.as_pointer()), align=4)
        shorts = builder.load(builder.bitcast(address, _SHORTS.as_pointer()), align=2)
        return builder.bitcast(builder.shl(builder.zext(shorts, _INTS), _integers(16)), _VECTOR)

    return Vector(array, types.intp), generate


@_typed
def store(_context: Any, array: Any, index: Any, x: Any) -> tuple[Any, Generator]:
    """Write array[index : index + 16] of float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _element(context, builder, signature.args[0], *arguments[:2])
        builder.store(arguments[2], builder.bitcast(address, _VECTOR.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, Vector), generate


@_typed
def prefetch(_context: Any, array: Any, index: Any) -> tuple[Any, Generator]:
    """Ask for the cache line of array[index], into the second-level cache. A hint: it never faults."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _element(context, builder, signature.args[0], *arguments)
        pointer = ir.IntType(8).as_pointer()
        form = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
        function = _insert_function(builder.module, form, "llvm.prefetch.p0")
        read, second_level, data = _I32(0), _I32(2), _I32(1)
        builder.call(function, [builder.bitcast(address, pointer), read, second_level, data])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@_typed
def splat(_context: Any, value: Any) -> tuple[Any, Generator]:
    """Sixteen copies of one float32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return _splat(builder, arguments[0])

    return Vector(types.float32), generate


@_typed
def broadcast4(_context: Any, array: Any, index: Any) -> tuple[Any, Generator]:
    """Sixteen copies each of array[index], .. array[index + 3] of float32: four vectors."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first = _element(context, builder, signature.args[0], *arguments)
        values = [builder.load(builder.gep(first, [_I32(i)])) for i in range(4)]
        return context.make_tuple(builder, signature.return_type, [_splat(builder, value) for value in values])

    return _FOUR(array, types.intp), generate


def _splat(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(undefined, value, _I32(0)), undefined, _integers(0))


def _select_max(builder: Any, x: Any, y: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


add = _binary(lambda builder, x, y: builder.fadd(x, y))
subtract = _binary(lambda builder, x, y: builder.fsub(x, y))
multiply = _binary(lambda builder, x, y: builder.fmul(x, y))
maximum = _binary(_select_max)  # y where either is NaN


@_typed
def fma(_context: Any, x: Any, y: Any, z: Any) -> tuple[Any, Generator]:
    """x * y + z, fused where the machine can."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return _call(builder, "fmuladd", *arguments)

    return Vector(Vector, Vector, Vector), generate


def _fold(width: int) -> Any:
    """Sum neighbouring runs of `width` lanes: [a0 a1 a2 ..], [b0 b1 ..] -> [a0+a1 a2+a3 .. b0+b1 ..]."""
    even = [lane for lane in range(2 * LANES) if lane // width % 2 == 0]
    odd = [lane + width for lane in even]

    def emit(builder: Any, x: Any, y: Any) -> Any:
        left = builder.shuffle_vector(x, y, ir.Constant(_INTS, even))
        return builder.fadd(left, builder.shuffle_vector(x, y, ir.Constant(_INTS, odd)))

    return _binary(emit)


fold8, fold4, fold2, fold1 = (_fold(width) for width in (8, 4, 2, 1))


def _swap(width: int) -> Any:
    """Exchange neighbouring runs of `width` lanes: [a0 a1 a2 a3 ..] -> [a1 a0 a3 a2 ..]."""
    lanes = [lane ^ width for lane in range(LANES)]
    return _unary(lambda builder, x: builder.shuffle_vector(x, x, ir.Constant(_INTS, lanes)))


swap8, swap4 = _swap(8), _swap(4)

# 2^f on [-1/2, 1/2]: the polynomial of degree 6 with the least greatest relative error, 2e-9; constant term first.
EXP2_COEFFICIENTS = (1.0, 0.69314718, 0.24022646, 0.055503279, 0.0096184844, 0.0013400154, 0.00015347320)


def _emit_exp2(builder: Any, x: Any) -> Any:
    """2^x = 2^n * 2^f with n the nearest integer. NaN stays NaN; n = -127 has the exponent bits of zero."""
    floor, nearest = _constant(-127.0), _constant(1.5 * 2**23)
    x = builder.select(builder.fcmp_unordered(">", x, floor), x, floor)
    shifted = builder.fadd(x, nearest)  # pushes the fraction out, and leaves n in the low bits
    fraction = builder.fsub(x, builder.fsub(shifted, nearest))
    power = _constant(EXP2_COEFFICIENTS[-1])
    for coefficient in EXP2_COEFFICIENTS[-2::-1]:
        power = _call(builder, "fmuladd", power, fraction, _constant(coefficient))
    exponent = builder.shl(builder.add(builder.bitcast(shifted, _INTS), _integers(127)), _integers(23))
    return builder.fmul(power, builder.bitcast(exponent, _VECTOR))


exp2 = _unary(_emit_exp2)  # for x <= 0: relative error below 1e-7, and 0 below 2^-126
