"""Plain data out of a pickle that nobody vouches for: RefCOCO's refs come as one.

Python's own unpickler runs what a pickle names, and can be made to fill the memory or to crash. Here a small machine
reads the few opcodes that containers, text and numbers need. It knows no names, calls nothing, recurses nowhere, and
holds no more than the file's own bytes ask for; everything else is refused with its opcode.
"""

from __future__ import annotations

import codecs
import io
import pickletools
import re
from typing import Any

from perceptio.sources.record import SourceError, shown

_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_NAMES = ("GLOBAL", "INST", "PERSID")  # their argument is the name
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")
_GETS = ("GET", "BINGET", "LONG_BINGET")
_ESCAPED = re.compile(rb"""(?:[^\\]|\\[\\'"nrt]|\\x[0-9a-fA-F]{2})*""")  # what Python 2 writes of a text
_KEYS = (str, int, float, bytes, type(None))  # whose hash does not look into other values


class _DamagedError(Exception):
    """The pickle's opcodes do not fit together."""


def load_plain(data: bytes, name: str) -> Any:
    """The lists, tuples, dicts, texts, bytes, numbers and None of a pickle. Texts of Python 2 are read as Latin-1.

    Raises SourceError, with the file's `name`, for a damaged pickle and for one that holds anything else.
    """
    stream = io.BytesIO(data)
    machine = _Machine(name)
    try:
        while True:
            start = stream.tell()
            code = stream.read(1)
            opcode = _OPCODES.get(code)
            if opcode is None:
                raise _DamagedError(f"{code!r} is no opcode" if code else "it ends before its STOP")
            if opcode.name == "STOP":
                return machine.result()
            machine.step(opcode.name, _argument(opcode, stream))
    except (_DamagedError, ValueError, IndexError, KeyError) as error:
        if isinstance(error, SourceError):
            raise
        message = f"'{name}' is no whole pickle: byte {start}: {error!s:.200}: download it again"
        raise SourceError(message) from error


def _argument(opcode: pickletools.OpcodeInfo, stream: io.BytesIO) -> Any:
    if opcode.arg is None:
        return None
    if opcode.name != "STRING":
        return opcode.arg.reader(stream)
    line = stream.readline().rstrip(b"\r\n")  # pickletools takes only ASCII here
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in b"'\"" or not _ESCAPED.fullmatch(line[1:-1]):
        raise _DamagedError(f"{shown(line)} is no quoted text")
    return codecs.escape_decode(line[1:-1])[0].decode("latin-1")  # type: ignore[attr-defined]


class _Machine:
    """The stack and the memo of a pickle; marks are kept as positions in the stack."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        """Carries out one opcode. Raises SourceError for a forbidden one, _DamagedError for one out of place."""
        if opcode in _VALUES:
            self.stack.append(argument)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode])
        elif opcode in _EMPTY:
            self.stack.append(_EMPTY[opcode]())
        elif opcode in _PUTS:
            self.memo[argument] = self._top()
        elif opcode in _GETS:
            self.stack.append(self.memo[argument])
        elif opcode in _TUPLES:
            self.stack.append(tuple(self._take(_TUPLES[opcode])))
        elif opcode not in ("PROTO", "FRAME"):
            self._containers(opcode, argument)

    def _containers(self, opcode: str, argument: Any) -> None:
        match opcode:
            case "MARK":
                self.marks.append(len(self.stack))
            case "POP":
                self._take(1)
            case "POP_MARK":
                self._since_mark()
            case "MEMOIZE":
                self.memo[len(self.memo)] = self._top()
            case "LIST":
                self.stack.append(self._since_mark())
            case "TUPLE":
                self.stack.append(tuple(self._since_mark()))
            case "DICT":
                values = self._since_mark()
                self.stack.append({})
                self._set(values)
            case "APPEND":
                self._extend(self._take(1))
            case "APPENDS":
                self._extend(self._since_mark())
            case "SETITEM":
                self._set(self._take(2))
            case "SETITEMS":
                self._set(self._since_mark())
            case _:
                self._refuse(opcode, argument)

    def result(self) -> Any:
        """The one value that is left at the end."""
        if len(self.stack) != 1 or self.marks:
            raise _DamagedError(
                f"it ends with {len(self.stack)} values and {len(self.marks)} marks, expected one value"
            )
        return self.stack[0]

    def _top(self) -> Any:
        return self._check(1)[-1]

    def _check(self, count: int) -> list[Any]:
        """The stack, if as many values as this stand on it above the last mark."""
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < count:
            raise _DamagedError("an opcode finds too few values")
        return self.stack

    def _take(self, count: int) -> list[Any]:
        taken = self._check(count)[-count:]
        del self.stack[-count:]
        return taken

    def _since_mark(self) -> list[Any]:
        if not self.marks:
            raise _DamagedError("an opcode finds no mark")
        start = self.marks.pop()
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def _extend(self, values: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, list):
            raise _DamagedError(f"values are appended to {shown(target)}")
        target.extend(values)

    def _set(self, values: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(values) % 2:
            raise _DamagedError(f"{len(values)} keys and values are set in {shown(target)}")
        for key in values[::2]:
            if not isinstance(key, _KEYS):
                raise _DamagedError(f"a dict's key is {shown(key)}, expected a text or a number")
        target.update(zip(values[::2], values[1::2], strict=True))

    def _refuse(self, opcode: str, argument: Any) -> None:
        if opcode in _NAMES:
            what = f" of {shown(argument)}"
        elif opcode == "STACK_GLOBAL" and len(self.stack) > 1:
            what = f" of {shown(self.stack[-2])} {shown(self.stack[-1])}"
        else:
            what = ""
        raise SourceError(
            f"'{self.name}' holds the opcode {opcode}{what}: refs are plain data and never need it, so the file is "
            "refused; take it from another place"
        )
