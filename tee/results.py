"""Result codes and their origins (GlobalPlatform TEE Client API 1.0, tables 4-2 and 4-3; TEE Internal Core API)."""

from enum import IntEnum


class Result(IntEnum):
    """What a call ended with. 32 bits on every wire; a TA may return codes that are not listed here."""

    SUCCESS = 0x00000000
    STORAGE_NOT_AVAILABLE = 0xF0100003
    CORRUPT_OBJECT = 0xF0100001
    GENERIC = 0xFFFF0000
    ACCESS_DENIED = 0xFFFF0001
    CANCEL = 0xFFFF0002
    ACCESS_CONFLICT = 0xFFFF0003
    EXCESS_DATA = 0xFFFF0004
    BAD_FORMAT = 0xFFFF0005
    BAD_PARAMETERS = 0xFFFF0006
    BAD_STATE = 0xFFFF0007
    ITEM_NOT_FOUND = 0xFFFF0008
    NOT_IMPLEMENTED = 0xFFFF0009
    NOT_SUPPORTED = 0xFFFF000A
    NO_DATA = 0xFFFF000B
    OUT_OF_MEMORY = 0xFFFF000C
    BUSY = 0xFFFF000D
    COMMUNICATION = 0xFFFF000E
    SECURITY = 0xFFFF000F
    SHORT_BUFFER = 0xFFFF0010
    EXTERNAL_CANCEL = 0xFFFF0011
    OVERFLOW = 0xFFFF300F
    TARGET_DEAD = 0xFFFF3024
    STORAGE_NO_SPACE = 0xFFFF3041
    MAC_INVALID = 0xFFFF3071
    SIGNATURE_INVALID = 0xFFFF3072
    TIME_NOT_SET = 0xFFFF5000
    TIME_NEEDS_RESET = 0xFFFF5001


class Origin(IntEnum):
    """Which layer a result comes from (GlobalPlatform TEE Client API, table 4-3)."""

    API = 1
    COMMS = 2
    TEE = 3
    TRUSTED_APP = 4


class TeeError(Exception):
    """A call that did not succeed: ``code`` is a :class:`Result` (or a TA's own code), ``origin`` who says so."""

    def __init__(self, code: int, origin: int = Origin.TEE, why: str = "") -> None:
        self.code = code
        self.origin = origin
        self.why = why
        super().__init__(f"{describe(code)} from {describe_origin(origin)}" + (f": {why}" if why else ""))


def describe(code: int) -> str:
    """The name of a result code, or its number in hex where it has none here."""
    try:
        return Result(code).name
    except ValueError:
        return f"{code:#010x}"


def describe_origin(origin: int) -> str:
    """The name of an origin, or its number."""
    try:
        return Origin(origin).name
    except ValueError:
        return f"origin {origin}"
