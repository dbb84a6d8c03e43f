"""Finds how deeply the containers of a pickle are nested, without building them.

Python hashes a nested tuple by recursion in C, so that a tuple of a million levels as the key of a dict ends
the process.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import BinaryIO

# Largest depth that is read. State dicts have fewer than ten levels.
LIMIT = 1000

# Opcodes that make a tuple, or an object from a tuple. Every level of nesting needs one of them.
_NESTING = (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.REDUCE, pickle.NEWOBJ)

# A pickle with fewer bytes that may be such opcodes is not scanned: no stack overflows at this depth.
_HARMLESS = 10_000

# Number of pickles in a file of torch before 1.6.
_LEGACY_PICKLES = 5


def is_too_deep(content: bytes) -> bool:
    """Return True if the containers of the first pickle in `content` are nested deeper than `LIMIT`.

    Raises
    ------
    ValueError
        If `content` is not a pickle.
    """
    if sum(map(content.count, _NESTING)) < _HARMLESS:
        return False
    return depth(content) > LIMIT


def is_any_too_deep(stream: BinaryIO) -> bool:
    """Return True if one of the pickles at the start of a stream is nested deeper than `LIMIT`.

    Files of torch before 1.6 are five pickles, followed by the bytes of the tensors.
    """
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    if size < _HARMLESS:
        return False
    try:
        return any(depth(stream) > LIMIT for _ in range(_LEGACY_PICKLES))
    except ValueError:
        return False  # not a pickle: torch refuses it


def depth(content: bytes | BinaryIO) -> int:
    """Return the number of levels of the most deeply nested object of a pickle.

    Raises
    ------
    ValueError
        If `content` does not start with a pickle.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[object, int] = {}
    deepest = 0
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1] if stack else 0
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo.get(argument, 0))
        else:
            first = _first_argument(opcode, len(stack), marks)
            inner = max(stack[first:], default=0)
            del stack[first:]
            if opcode.stack_after:
                stack += [inner + 1] * len(opcode.stack_after)
                deepest = max(deepest, inner + 1)
    return deepest


def _first_argument(opcode: pickletools.OpcodeInfo, size: int, marks: list[int]) -> int:
    """Return the position on the stack of the first object that an opcode takes."""
    if pickletools.markobject not in opcode.stack_before:
        return max(size - len(opcode.stack_before), 0)
    before = opcode.stack_before.index(pickletools.markobject)
    return max((marks.pop() if marks else 0) - before, 0)
