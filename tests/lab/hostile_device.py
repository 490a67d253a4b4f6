"""A TEE device that breaks the rules, as a vhost-user backend: `--lie FILE` names a file that says how at the moment.

Apart from that it opens whatever is asked for, and answers calls with their own parameters. Answers to RPCs are kept in
FILE.replies: a line each of the RPC's id, the result, and the first parameter's words.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from device.config import Config
from device.messages import CONFIG, EVENT_HEADER, EVENTS, PARAM, REQUEST_HEADER, REQUESTS, RESPONSE_HEADER
from device.params import pack_raw, unpack_raw
from device.wire import NULL_REGION, Event, Feature, ParamType, Queue, Request
from pyvhost import Chain, Device
from pyvhost.io import program
from tee.driver import GenCap, TeeInfo, TeeKind
from tee.rpc import RpcCommand

RPC_REPLY = REQUESTS[Request.RPC_REPLY].body.codec
OK = RESPONSE_HEADER.pack(status=0, flags=0, ret=0, origin=3)


class HostileDevice(Device):
    """Three queues, RPC."""

    num_queues = 3
    features = int(Feature.RPC)
    config_size = CONFIG.size

    def __init__(self, lie: Path) -> None:
        self._lie = lie
        self._next = 1
        self._epoch = 1

    @property
    def lie(self) -> str:
        """How to lie now."""
        return self._lie.read_text().strip()

    def read_config(self, offset: int, length: int) -> bytes:
        info = TeeInfo(TeeKind.SOFT, 1, 0, GenCap.GP | GenCap.REG_MEM | GenCap.MEMREF_NULL)
        data = bytearray(Config(self._epoch, info).pack())
        if self.lie == "magic":
            data[:4] = b"ABCD"
        elif self.lie == "version":
            data[4] = 9
        elif self.lie == "huge events":
            data[40:44] = b"\xff\xff\xff\x7f"
        elif self.lie == "no limits":
            data[28 + 4 : 92] = bytes(60)
        return bytes(data[offset : offset + length])

    def process(self, index: int) -> bool:
        queue = self.queues[index]
        if queue is None or index == Queue.EVENT:
            return False
        if self.lie == "no answer to anything" or (self.lie == "no answers to RPCs" and index == Queue.CONTROL):
            return False
        return queue.drain(self.serve)

    def serve(self, chain: Chain) -> int | None:
        """Answer one request."""
        data = chain.read(length=1 << 16)
        header = REQUEST_HEADER.unpack(data)
        request = Request(header.type)
        body = data[REQUEST_HEADER.size :]
        answer = self.ANSWERS.get(request)
        response = OK + (answer(self, body) if answer is not None else b"")
        lie = _LIES.get(self.lie) if request is Request.INVOKE else None
        if lie is not None:
            lied = lie(self, chain, response)
            if lied is None:
                return None
            response = lied
        return chain.write(response[: chain.writable_bytes])

    def _ident(self) -> int:
        self._next += 1
        return self._next

    def _context(self, body: bytes) -> bytes:
        return (0 if self.lie == "context 0" else self._ident()).to_bytes(8, "little")

    def _session(self, body: bytes) -> bytes:
        count = int.from_bytes(body[36:40], "little")
        ident = 0 if self.lie == "session 0" else self._ident()
        return ident.to_bytes(4, "little") + count.to_bytes(4, "little") + body[40:]

    def _invoke(self, body: bytes) -> bytes:
        return body[8:12] + bytes(4) + body[16:]

    def _region(self, body: bytes) -> bytes:
        return (77 if self.lie == "region twice" else self._ident()).to_bytes(8, "little")

    def _reply(self, body: bytes) -> bytes:
        words = RPC_REPLY.unpack(body[: RPC_REPLY.size])
        params = unpack_raw(body, RPC_REPLY.size, words.num_params)
        line = " ".join(str(n) for n in (words.rpc, words.ret, *(params[0][1:] if params else ())))
        with self._lie.with_suffix(".replies").open("a") as file:
            file.write(f"{line}\n")
        return b""

    ANSWERS: ClassVar[dict[Request, Callable[[HostileDevice, bytes], bytes]]] = {
        Request.OPEN_CONTEXT: _context,
        Request.OPEN_SESSION: _session,
        Request.INVOKE: _invoke,
        Request.REGISTER_MEMORY: _region,
        Request.RPC_REPLY: _reply,
    }

    # -- events

    def send(self, data: bytes, written: int | None = None) -> None:
        """One event, if there is a buffer for it."""
        queue = self.queues[Queue.EVENT]
        assert queue is not None
        chain = queue.pop()
        if chain is not None:
            queue.push(chain.head, chain.write(data) if written is None else written)
            queue.notify()

    def rpc(self, ident: int, params: bytes = b"", *, count: int | None = None, command: int = 0) -> None:
        """An RPC event."""
        body = EVENTS[Event.RPC].codec.pack(
            rpc=ident,
            command=command,
            target=0,
            deadline_ms=1000,
            call=0,
            context=0,
            session=0,
            num_params=len(params) // PARAM.size if count is None else count,
        )
        self.send(EVENT_HEADER.pack(type=Event.RPC, flags=0, epoch=self._epoch) + body + params)


Lie = Callable[[HostileDevice, Chain, bytes], "bytes | None"]


def _params(change: Callable[[list[tuple[int, int, int, int]]], None]) -> Lie:
    def lie(device: HostileDevice, chain: Chain, response: bytes) -> bytes:
        at = len(OK) + 8
        params = unpack_raw(response, at, (len(response) - at) // PARAM.size)
        change(params)
        return response[:at] + pack_raw(params)

    return lie


def _attr(params: list[tuple[int, int, int, int]]) -> None:
    params[0] = (ParamType.VALUE_IN, *params[0][1:])


def _size(params: list[tuple[int, int, int, int]]) -> None:
    attr, a, b, c = params[0]
    params[0] = (attr, a, b + 1, c)


def _offset(params: list[tuple[int, int, int, int]]) -> None:
    attr, a, b, c = params[0]
    params[0] = (attr, a + 8, b, c)


def _used(written: int) -> Lie:
    def lie(device: HostileDevice, chain: Chain, response: bytes) -> None:
        queue = device.queues[Queue.REQUEST]
        assert queue is not None
        queue.push(chain.head, written)

    return lie


def _raw(entries: Callable[[int], list[tuple[int, int]]]) -> Lie:
    """Used entries (head, bytes) that the library would not write; in its pure split queue, behind its back."""

    def lie(device: HostileDevice, chain: Chain, response: bytes) -> None:
        queue: Any = device.queues[Queue.REQUEST]
        chain.write(response)
        for head, written in entries(chain.head):
            slot = queue._used_idx & (queue.size - 1)
            queue._ids[slot], queue._lengths[slot] = head, written
            queue._used_idx = queue._used[1] = (queue._used_idx + 1) & 0xFFFF
        queue.notify()

    return lie


def _events(send: Callable[[HostileDevice], None]) -> Lie:
    def lie(device: HostileDevice, chain: Chain, response: bytes) -> bytes:
        send(device)
        return response

    return lie


def _many_rpcs(device: HostileDevice) -> None:
    for ident in range(1, 30):
        device.rpc(ident, pack_raw([(ParamType.VALUE_IN, 3_600_000, 0, 0)]), command=RpcCommand.SUSPEND)


def _withdrawals(device: HostileDevice) -> None:
    for ident in range(1, 33):
        body = EVENTS[Event.RPC_WITHDRAWN].codec.pack(rpc=ident)
        device.send(EVENT_HEADER.pack(type=Event.RPC_WITHDRAWN, flags=0, epoch=device._epoch) + body)


def _harmless(device: HostileDevice) -> None:
    """What a driver ignores, or answers with an error, and goes on."""
    device.send(EVENT_HEADER.pack(type=0x9999, flags=0, epoch=device._epoch))
    device.send(EVENT_HEADER.pack(type=Event.RPC, flags=0, epoch=12345))
    device.send(b"", written=0)
    device.rpc(1, pack_raw([(ParamType.MEMREF_OUT, 0, 1 << 60, 4711)]), command=RpcCommand.FS)
    device.rpc(2, pack_raw([(ParamType.MEMREF_OUT, 1 << 63, 1 << 63, NULL_REGION)]), command=RpcCommand.LOAD_TA)
    device.rpc(3, pack_raw([(ParamType.VALUE_IN, 0, 1 << 60, 0)]), command=RpcCommand.SHM_ALLOC)
    device.rpc(
        4, pack_raw([(ParamType.VALUE_IN, 0, 0, 0), (ParamType.MEMREF_INOUT, 0, 0, 99)]), command=RpcCommand.SHM_FREE
    )
    device.rpc(5, pack_raw([(ParamType.VALUE_IN, 9, 9, 9)] * 20), command=RpcCommand.NOTIFICATION)
    device.rpc(6, command=RpcCommand.GET_TIME)
    device.rpc(7, command=RpcCommand.I2C_TRANSFER)


def _own_rpcs(device: HostileDevice) -> None:
    """What the driver serves itself: wait 0, send 1 of notifications, suspending, the time."""
    wait, send = (
        [(ParamType.VALUE_IN, 0, 5, 0)],
        [(ParamType.VALUE_IN, 1, 5, 0)],
    )
    device.rpc(1, pack_raw([(ParamType.VALUE_OUT, 0, 0, 0)]), command=RpcCommand.GET_TIME)
    device.rpc(2, pack_raw([(ParamType.VALUE_IN, 200, 0, 0)]), command=RpcCommand.SUSPEND)
    device.rpc(3, pack_raw(wait), command=RpcCommand.NOTIFICATION)
    device.rpc(4, pack_raw(wait), command=RpcCommand.NOTIFICATION)  # one may wait for each value
    device.rpc(5, pack_raw(send), command=RpcCommand.NOTIFICATION)
    device.rpc(6, pack_raw(send), command=RpcCommand.NOTIFICATION)
    device.rpc(7, pack_raw(wait), command=RpcCommand.NOTIFICATION)  # was sent before
    device.rpc(8, pack_raw([(ParamType.VALUE_IN, 0, 5, 100)]), command=RpcCommand.NOTIFICATION)
    device.rpc(9, pack_raw([(ParamType.VALUE_IN, 0, 256, 0)]), command=RpcCommand.NOTIFICATION)


_LIES: dict[str, Lie] = {
    "used 0": _used(0),
    "used too little": _used(8),
    "used too much": _raw(lambda head: [(head, 1 << 20)]),
    "returned twice": _raw(lambda head: [(head, 16), (head, 16)]),
    "another request returned": _raw(lambda head: [(head ^ 1, 100)]),
    "out of the ring": _raw(lambda head: [(0x12345, 100)]),
    "fewer parameters": lambda device, chain, response: response[: len(OK)] + bytes(8),
    "another type": _params(_attr),
    "more than there is room for": _params(_size),
    "another offset": _params(_offset),
    "unknown status": lambda device, chain, response: RESPONSE_HEADER.pack(status=99, flags=7, ret=0, origin=9),
    "no answer": lambda device, chain, response: None,
    "events": _events(_harmless),
    "own rpcs": _events(_own_rpcs),
    "rpc 0": _events(lambda device: device.rpc(0)),
    "rpc cut short": _events(lambda device: device.rpc(1, count=5)),
    "rpc with a strange parameter": _events(lambda device: device.rpc(1, pack_raw([(0x77, 0, 0, 0)]))),
    "too many rpcs": _events(_many_rpcs),
    "an event of 3 bytes": _events(lambda device: device.send(b"abc")),
    "no answers to RPCs": _events(_withdrawals),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Serve."""
    parser = program.options("A TEE device that breaks the rules.", "misc")
    parser.add_argument("--lie", type=Path, required=True)
    return program.run(parser, lambda arguments: HostileDevice(arguments.lie), argv)


if __name__ == "__main__":
    sys.exit(main())
