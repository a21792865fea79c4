"""A Triton module in NumPy: what a lowered kernel computes, where there is no card to run it on.

Pallas's own interpreter runs a kernel before it is lowered. This one takes the module that a card's compiler would get,
and runs its programs one after the other. It knows the operations that our kernels have, and looks at every address.
"""

import functools
import re

import ml_dtypes
import numpy as np

_DTYPES = {
    "i1": np.bool_,
    "i32": np.int32,
    "i64": np.int64,
    "f32": np.float32,
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
}
_BINARY = {
    "arith.addi": np.add,
    "arith.subi": np.subtract,
    "arith.muli": np.multiply,
    "arith.minsi": np.minimum,
    "arith.maxsi": np.maximum,
    "arith.remsi": np.fmod,
    "arith.divsi": lambda a, b: np.trunc(np.asarray(a, np.float64) / b),
    "arith.andi": np.bitwise_and,
    "arith.ori": np.bitwise_or,
    "arith.xori": np.bitwise_xor,
    "arith.shli": np.left_shift,
    "arith.shrsi": np.right_shift,
    "arith.addf": np.add,
    "arith.subf": np.subtract,
    "arith.mulf": np.multiply,
    "arith.divf": np.divide,
    "arith.minimumf": np.minimum,
    "arith.maximumf": np.maximum,
    "arith.minnumf": np.fmin,
    "arith.maxnumf": np.fmax,
}
_CASTS = {"arith.extui", "arith.extsi", "arith.trunci", "arith.extf", "arith.truncf", "arith.sitofp", "tt.fp_to_fp"}
_COMPARE = [np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal]
_COMPARE_FLOATS = {1: np.equal, 2: np.greater, 3: np.greater_equal, 4: np.less, 5: np.less_equal, 13: np.not_equal}
_UNARY = {
    "math.exp": np.exp,
    "__nv_expf": np.exp,
    "math.absf": np.abs,
    "__nv_fabsf": np.abs,
    "__nv_popc": lambda a: np.bitwise_count(np.asarray(a).view(np.uint32)),
}


class _Pointer:
    def __init__(self, memory, offset):
        self.memory, self.offset = memory, np.asarray(offset)

    def at(self, mask):
        """Offsets, and which of them are used; those have to lie in the memory."""
        used = np.broadcast_to(True if mask is None else mask, self.offset.shape)
        there = self.offset[used]
        assert ((there >= 0) & (there < self.memory.size)).all(), "an address outside of the array"
        return self.offset, used


def run(result, inputs, outputs):
    """The outputs, of these shapes and dtypes, of a lowering result on `inputs`; NaN, or -7, where no program wrote."""
    (function,) = (op.operation for op in result.module.body.operations if op.operation.name == "tt.func")
    outs = [np.full(out.shape, _nothing(out.dtype), out.dtype) for out in outputs]
    block = function.regions[0].blocks[0]
    memory = [np.asarray(value).reshape(-1) for value in inputs] + [out.reshape(-1) for out in outs]
    for program in range(int(np.prod(result.grid))):
        values = {argument: _Pointer(m, 0) for argument, m in zip(block.arguments, memory, strict=True)}
        _block(block, values, program)
    return outs


def _nothing(dtype):
    return -7 if dtype.kind == "i" else np.nan


def _block(block, values, program):
    for op in block.operations:
        op = op.operation
        given = [values[operand] for operand in op.operands]
        if op.name in ("scf.yield", "tt.return"):
            return given
        with np.errstate(all="ignore"):
            results = _operation(op, given, values, program)
        for value, result in zip(op.results, results, strict=True):
            values[value] = result
    return []


def _operation(op, given, values, program):
    if op.name == "scf.if":
        region = op.regions[0 if given[0] else 1]
        return _block(region.blocks[0], values, program) if len(region.blocks) else []
    if op.name == "scf.for":
        low, high, step, *carry = given
        block = op.regions[0].blocks[0]
        for i in range(int(low), int(high), int(step)):
            values.update(zip(block.arguments, [np.int32(i), *carry], strict=True))
            carry = _block(block, values, program)
        return carry
    if op.name == "tt.store":
        pointer, value, *mask = given
        offset, used = pointer.at(mask[0] if mask else None)
        pointer.memory[offset[used]] = np.broadcast_to(value, offset.shape)[used]
        return []
    kind = re.fullmatch(r"tensor<((?:\d+x)*)(.*)>|(.*)", str(op.results[0].type))
    shape = tuple(int(size) for size in (kind[1] or "").split("x")[:-1])
    result = _value(op, given, shape, functools.partial(_cast, _DTYPES.get(kind[2] or kind[3])), program)
    return [result]


def _cast(dtype, value):
    return np.asarray(value).astype(dtype)[()]


def _value(op, given, shape, cast, program):
    name, attributes = op.name, op.attributes
    number = lambda key: int(re.match(r"-?\d+", str(attributes[key]))[0])  # noqa: E731
    if name == "arith.constant":
        return _constant(str(attributes["value"]), cast)
    if name == "tt.get_program_id":
        return np.int32(program if number("axis") == 0 else 0)
    if name == "tt.make_range":
        return np.arange(number("start"), number("end"), dtype=np.int32)
    if name in ("tt.splat", "tt.broadcast"):
        (a,) = given
        if isinstance(a, _Pointer):
            return _Pointer(a.memory, np.broadcast_to(a.offset, shape))
        return np.broadcast_to(a, shape)
    if name == "tt.expand_dims":
        return np.expand_dims(given[0], number("axis"))
    if name == "tt.addptr":
        return _Pointer(given[0].memory, given[0].offset + np.asarray(given[1], np.int64))
    if name == "tt.load":
        pointer, *rest = given
        offset, used = pointer.at(rest[0] if rest else None)
        value = pointer.memory[np.where(used, offset, 0)]
        # Without a value for what is not loaded, it is anything.
        other = rest[1] if len(rest) > 1 else _nothing(value.dtype)
        return np.where(used, value, np.asarray(other).astype(value.dtype))[()]
    if name in ("tt.reduce", "tt.scan"):
        combine, _ = op.regions[0].blocks[0].operations
        ufunc = _BINARY[combine.operation.name]
        return cast((ufunc.reduce if name == "tt.reduce" else ufunc.accumulate)(given[0], number("axis")))
    if name == "tt.dot":
        a, b, total = given
        return cast(a.astype(np.float32) @ b.astype(np.float32) + total)
    if name == "arith.cmpi":
        return _COMPARE[number("predicate")](*given)
    if name == "arith.cmpf":
        return _COMPARE_FLOATS[number("predicate")](*given)
    if name == "arith.select":
        return np.where(*given)[()]
    if name in _CASTS:
        return cast(given[0])
    if name == "arith.negf":
        return -given[0]
    if name == "tt.extern_elementwise":
        name = str(attributes["symbol"]).strip('"')
    return cast(_BINARY[name](*given) if name in _BINARY else _UNARY[name](*given))


def _constant(text, cast):
    text = re.sub(r"^dense<(.*)>.*", r"\1", text).split(" ")[0]
    if text in ("true", "false"):
        return np.bool_(text == "true")
    if text.startswith("0x"):  # bits: infinities and NaN
        return cast(np.array(int(text, 16), np.uint32).view(np.float32))
    return cast(float(text)) if "." in text or "e" in text else cast(int(text))
