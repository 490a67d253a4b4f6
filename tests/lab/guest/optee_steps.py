"""In the host VM, which has OP-TEE: steps of tests, by our own client, with `--` between them. Each says JSON.

The TAs are those of OP-TEE's test suite: of their commands, those are used that take bytes and give bytes.
"""

import json
import mmap
import os
import sys
import time
import uuid

from tee.io.linux import LinuxTee
from tee.io.linux_supplicant import LinuxSupplicant
from tee.io.supplicant import Services
from tee.linux.ioctls import ParamType
from tee.results import describe

CRYPT = uuid.UUID("cb3e5ba0-adf1-11e0-998b-0002a5d5c51b")
STORAGE = uuid.UUID("b689f2a7-8adf-477a-9f99-32e90c0ad0a2")
SHA256 = 2
OPEN, READ, CREATE, UNLINK = 0, 2, 4, 6
PRIVATE = 1
READABLE, META, OVERWRITE = 1, 4, 0x400
NONE = (ParamType.NONE, 0, 0, 0)


class RefusedError(Exception):
    """The step does not get further."""

    def __init__(self, **what):
        super().__init__()
        self.what = what


def tell(**what):
    print(json.dumps(what), flush=True)


def pattern(size):
    return bytes(i * 131 & 0xFF for i in range(256)) * -(-size // 256)


def version(path):
    with LinuxTee(path) as tee:
        tell(version=tee.version())


def opened(tee, ta):
    answer = tee.open_session(ta.bytes)
    if answer.code:
        raise RefusedError(open=describe(answer.code), origin=answer.origin)
    return answer.session


def digest(kind, size, offset):
    """SHA-256, by the TA, of bytes from `offset` on in memory of ours, or of the kernel's."""
    size, offset = int(size), int(offset)
    with LinuxTee() as tee:
        session = opened(tee, CRYPT)
        if kind == "registered":
            room = mmap.mmap(-1, offset + size)
            text = tee.register(room)
        else:
            text = tee.allocate(offset + size)
        text.data[offset : offset + size] = pattern(size)[:size]
        out = tee.allocate(32)
        answer = tee.invoke(
            session,
            SHA256,
            [(ParamType.MEMREF_IN, offset, size, text.id), (ParamType.MEMREF_OUT, 0, 32, out.id), NONE, NONE],
        )
        tell(invoke=describe(answer.code), size=answer.params[1][2], digest=bytes(out.data[:32]).hex())
        for shm in (text, out):
            shm.close()


def missing():
    with LinuxTee() as tee:
        opened(tee, uuid.UUID("00000000-1111-2222-3333-444444444444"))


class Store:
    """Objects of the storage TA, open for one session."""

    def __enter__(self):
        self.tee = LinuxTee()
        try:
            self.session = opened(self.tee, STORAGE)
        except BaseException:
            self.tee.close()
            raise
        return self

    def __exit__(self, *_):
        self.tee.close_session(self.session)  # memory that is still shared keeps the context
        self.tee.close()

    def memory(self, data):
        shm = self.tee.allocate(len(data))
        shm.data[: len(data)] = data
        return ParamType.MEMREF_IN, 0, len(data), shm.id

    def must(self, command, *params):
        answer = self.tee.invoke(self.session, command, [*params, *[NONE] * (4 - len(params))])
        if answer.code:
            raise RefusedError(command=command, code=describe(answer.code))
        return answer.params

    def open(self, name, flags):
        mode, storage = (ParamType.VALUE_INOUT, flags, 0, 0), (ParamType.VALUE_IN, PRIVATE, 0, 0)
        return self.must(OPEN, self.memory(name.encode()), mode, storage)[1][2]


def store(name, text):
    with Store() as made:
        mode = ParamType.VALUE_INOUT, READABLE | META | OVERWRITE, 0, 0
        nobody = ParamType.VALUE_IN, 0, PRIVATE, 0
        made.must(CREATE, made.memory(name.encode()), mode, nobody, made.memory(bytes.fromhex(text)))
    tell(stored=name)


def load(name, size):
    with Store() as made:
        handle = made.open(name, READABLE)
        room = made.tee.allocate(int(size))
        params = (ParamType.MEMREF_OUT, 0, int(size), room.id), (ParamType.VALUE_INOUT, handle, 0, 0)
        read = made.must(READ, *params)[1][2]
        tell(text=bytes(room.data[:read]).hex())


def remove(name):
    with Store() as made:
        made.must(UNLINK, (ParamType.VALUE_IN, made.open(name, META), 0, 0))
    tell(removed=name)


def held_supplicant(gate):
    """Answers nothing before there is a file `gate`."""

    class Held(LinuxSupplicant):
        def _serve(self, command, raw):
            print("asked", flush=True)
            while not os.path.exists(gate):
                time.sleep(0.05)
            return super()._serve(command, raw)

    # without files OP-TEE opens no session: it looks up the TA's version there
    Held(Services(("/lib/optee_armtz",), "/var/lib/tee-files").supplicant()).run()


if __name__ == "__main__":
    for step in " ".join(sys.argv[1:]).split(" -- "):
        name, *rest = step.split()
        try:
            globals()[name](*rest)
        except RefusedError as refused:
            tell(**refused.what)
