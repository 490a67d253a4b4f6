"""One FF-A call or answer: the registers x0 to x17."""

from __future__ import annotations

from ffa.abi.ids import Call, Error, fid, name

REGISTERS = 18
MASK32 = 0xFFFF_FFFF
MASK64 = 0xFFFF_FFFF_FFFF_FFFF
_ZEROS = tuple((0,) * n for n in range(REGISTERS + 1))


class Frame(tuple[int, ...]):
    """Eighteen 64-bit register values; those not given are zero. Immutable, and as cheap as a tuple.

    ``Frame(0x84000063, 0x10002)`` or, by name, ``Frame.of(Call.VERSION, 0x10002)``.
    """

    __slots__ = ()

    def __new__(cls, *registers: int) -> Frame:
        """Raises ValueError for more than 18 values, or one that does not fit 64 bits unsigned."""
        highest = max(registers, default=0)
        if len(registers) > REGISTERS or highest > MASK64 or min(registers, default=0) < 0:
            raise ValueError("a frame has at most 18 registers of 64 bits, unsigned")
        kind = _Narrow if highest <= MASK32 else Frame
        return tuple.__new__(kind, registers + _ZEROS[REGISTERS - len(registers)])

    @classmethod
    def of(cls, call: Call, *arguments: int, smc64: bool | None = None) -> Frame:
        """A call by its name, with x1 and on."""
        return cls(fid(call, smc64), *arguments)

    @classmethod
    def success(cls, *results: int, smc64: bool = False) -> Frame:
        """FFA_SUCCESS with ``results`` from w2 on (w1 is the target information, zero here)."""
        return cls(fid(Call.SUCCESS, smc64), 0, *results)

    @classmethod
    def failure(cls, code: Error) -> Frame:
        """FFA_ERROR with ``code`` in w2."""
        return _FAILURES[code]

    @property
    def fid(self) -> int:
        """The function id: w0."""
        return self[0] & MASK32

    @property
    def narrow(self) -> Frame:
        """The w registers: each value's low 32 bits, which is all that an SMC32 call has."""
        return tuple.__new__(_Narrow, [value & MASK32 for value in self])

    @property
    def error(self) -> Error | None:
        """The code if this is FFA_ERROR with a known one, else None."""
        if self.fid != _ERROR:
            return None
        code = self[2] & MASK32
        return _CODES.get(code)

    @property
    def ok(self) -> bool:
        """Whether this is FFA_SUCCESS, of either form."""
        return self.fid in _SUCCESS

    def __repr__(self) -> str:
        used = max((n for n, value in enumerate(self) if value), default=0)
        text = " ".join(f"{value:x}" for value in self[1 : used + 1])
        error = self.error
        return f"<{name(self.fid)}{' ' + text if text else ''}{f' ({error.name})' if error is not None else ''}>"


class _Narrow(Frame):
    """A frame that is its own narrow form, which is found out once: most calls pass through several hands."""

    __slots__ = ()

    @property
    def narrow(self) -> Frame:
        """Itself."""
        return self


_ERROR = fid(Call.ERROR)
_SUCCESS = (fid(Call.SUCCESS), fid(Call.SUCCESS, True))
_CODES = {code & MASK32: code for code in Error}
_FAILURES = {code: Frame(_ERROR, 0, code & MASK32) for code in Error}


def pair(low: int, high: int) -> int:
    """A 64-bit value from the low halves of two registers."""
    return (low & MASK32) | (high & MASK32) << 32


def halves(value: int) -> tuple[int, int]:
    """A 64-bit value as two register values: low half, high half."""
    return value & MASK32, value >> 32 & MASK32
