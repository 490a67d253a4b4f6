"""OP-TEE's HOTP: one-time passwords after RFC 4226, of six digits.

Command 0 registers the shared key (memory IN, 10 to 64 bytes); command 1 gives the next password (value OUT: a). Key
and counter belong to the session: they begin anew with each.
"""

import hmac
from dataclasses import dataclass, field

from tee.soft.ta import UUID, Client, Direction, Origin, Parameters, Result, TeeError, TrustedApplication

MIN_KEY, MAX_KEY = 10, 64
DIGITS = 10**6


@dataclass
class State:
    """Of one session."""

    key: bytes = field(default=b"", repr=False)
    counter: int = 0


class Hotp(TrustedApplication):
    """The TA of the public example, with its UUID and its commands."""

    uuid = UUID("484d4143-2d53-4841-3120-4a6f636b6542")
    description = "Example of One Time Passwords based HMAC operation (RFC4226)"

    async def open_session(self, params: Parameters, client: Client) -> State:
        """No parameters."""
        params.expect(0)
        return State()

    async def invoke(self, session: State, command: int, params: Parameters) -> None:
        """See the module's text."""
        if command > 1:
            raise bad(f"no command {command}")
        params.expect(1)
        if command == 0:
            key = params.memory(0, Direction.IN)
            if key.capacity > MAX_KEY:
                raise bad(f"a key of {key.capacity} bytes")
            session.key = key.read()
            return
        answer = params.value(0, Direction.OUT)
        if len(session.key) < MIN_KEY:
            raise bad(f"a key of {len(session.key)} bytes")
        answer.a = password(session.key, session.counter)
        session.counter = (session.counter + 1) & ((1 << 64) - 1)


def password(key: bytes, counter: int) -> int:
    """RFC 4226, section 5.3."""
    digest = hmac.new(key, counter.to_bytes(8, "big"), "sha1").digest()
    offset = digest[-1] & 0xF
    return (int.from_bytes(digest[offset : offset + 4], "big") & 0x7FFFFFFF) % DIGITS


def bad(why: str) -> TeeError:
    """BAD_PARAMETERS."""
    return TeeError(Result.BAD_PARAMETERS, Origin.TRUSTED_APP, why)


TA = Hotp
