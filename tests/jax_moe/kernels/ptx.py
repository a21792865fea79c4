"""A warp in NumPy: inline PTX as the kernels have it, instruction by instruction, over one memory that warps share.

It knows the instructions of `mosaic_gpu_ahead.py`. Lanes go together: a branch that they disagree about is an error,
and so is an address outside of the arrays, or one that is not a multiple of what is read there.
"""

import operator
import re

import numpy as np

LANES = 32
_COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "ge": np.greater_equal}
_SIGNED = {"s32": np.int32, "u32": np.uint32, "b32": np.uint32}
_ARITHMETIC = {
    "add": operator.add,
    "sub": operator.sub,
    "shr": operator.rshift,
    "min": np.minimum,
    "and": np.logical_and,
}


class Trap(Exception):
    """A warp gave up."""


class Memory:
    """Arrays, each at an address of its own, with room between them that nobody may touch."""

    def __init__(self, *arrays):
        self._at, self.addresses, place = [], [], 1 << 33
        for array in arrays:
            self._at.append((place, array.reshape(-1).view(np.uint32)))
            self.addresses.append(place)
            place += array.nbytes + (-array.nbytes % 4096) + 4096

    def words(self, address, count):
        """The array, and the index in it of `count` words of four bytes at `address`."""
        assert address % (4 * count) == 0, f"{count} words at {address}"
        for start, words in self._at:
            index = (int(address) - start) // 4
            if index in range(words.size - count + 1):
                return words, index
        raise AssertionError(f"an address outside of the arrays: {address}")


def warp(text, memory, operands):
    """Runs `text`, whose $0, $1, ... are `operands`, in steps: a generator that yields before each instruction."""
    lines = [line.strip().rstrip(";") for line in text.splitlines()]
    labels = {line[:-1]: n for n, line in enumerate(lines) if line.endswith(":")}
    registers = {"%laneid": np.arange(LANES, dtype=np.uint32)}
    registers |= {f"${n}": np.full(LANES, value, np.uint64) for n, value in enumerate(operands)}

    def value(word, dtype):
        if word in registers:
            return registers[word].astype(dtype)
        return np.full(LANES, int(word, 0), np.int64).astype(dtype)

    def address(word):
        register, _, offset = word.strip("[]").partition(" + ")
        return registers[register] + np.uint64(int(offset or 0))

    def each(mask, where, count):
        for lane in np.flatnonzero(mask):
            yield lane, *memory.words(where[lane], count)

    n = 0
    while n < len(lines):
        line = lines[n]
        n += 1
        if line in ("{", "}", "") or line.startswith(".reg") or line.endswith(":"):
            continue
        yield line
        mask = np.ones(LANES, bool)
        if line.startswith("@"):
            guard, line = line[1:].split(" ", 1)
            mask = registers[guard].astype(bool)
        name, _, rest = line.partition(" ")
        kind, last = name.partition(".")[0], name.rpartition(".")[2]
        words = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
        if kind == "trap":
            if mask.any():
                raise Trap
        elif kind == "bra":
            assert mask.all() or not mask.any(), f"lanes disagree: {line}"
            n = labels[words[0]] if mask.all() else n
        elif kind in ("ld", "st"):
            pointer, data = (words[1], words[0]) if kind == "ld" else words
            names = data.strip("{}").split(", ")
            for name in names if kind == "ld" else ():
                registers.setdefault(name, np.zeros(LANES, np.uint32))
            for lane, array, index in each(mask, address(pointer), len(names)):
                for k, name in enumerate(names):
                    if kind == "ld":
                        registers[name] = registers[name].copy()
                        registers[name][lane] = array[index + k]
                    else:
                        array[index + k] = registers[name][lane]
        elif kind in ("atom", "red"):
            pointer, amount = words[-2:]
            for lane, array, index in each(mask, address(pointer), 1):
                if kind == "atom":
                    registers[words[0]] = registers[words[0]].copy()
                    registers[words[0]][lane] = array[index]
                array[index] += value(amount, np.uint32)[lane]
        elif kind == "shfl":
            registers[words[0]] = value(words[1], np.uint32)[value(words[2], np.int64) % LANES]
        elif kind == "setp":
            compare, dtype = name.split(".")[1], _SIGNED[last]
            found = _COMPARE[compare](value(words[1], dtype), value(words[2], dtype))
            registers[words[0]] = found & registers[words[3]] if ".and." in name else found
        elif kind == "selp":
            registers[words[0]] = np.where(registers[words[3]], value(words[1], np.uint32), value(words[2], np.uint32))
        elif kind == "mad":
            dtype = np.uint64 if ".wide." in name else np.uint32
            a, b = (value(word, np.uint32).astype(dtype) for word in words[1:3])
            registers[words[0]] = a * b + value(words[3], dtype)
        elif kind == "mov":
            registers[words[0]] = value(words[1], np.uint32)
        elif kind in _ARITHMETIC:
            dtype = {"u64": np.uint64, "pred": bool}.get(last) or _SIGNED[last]
            found = _ARITHMETIC[kind](*(value(word, dtype) for word in words[1:]))
            registers[words[0]] = found if dtype in (bool, np.uint64) else found.astype(np.uint32)
        else:
            assert kind in ("fence", "bar"), line
