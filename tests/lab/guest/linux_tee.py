"""In a guest whose kernel drives the device: a backend of its own on /dev/tee0, and guests of that, all here.

Argument: what to do. The last line of output is JSON. A supplicant serves /dev/teepriv0 already.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from guest_driver.client import (
    CancelToken,
    Context,
    Null,
    SharedMemory,
    TempIn,
    TempInOut,
    TempOut,
    ValueIn,
    ValueInOut,
    ValueOut,
)
from tee.calls import Login, RegisterMemory, UnregisterMemory
from tee.io.runtime import TeeRuntime
from tee.memory import Memory
from tee.params import Direction
from tee.results import TeeError, describe
from tee.soft.examples import UUIDS
from virtio_tee.attach import open_driver

IN, OUT, INOUT = Direction.IN, Direction.OUT, Direction.INOUT
ADD, XOR, WAIT, SHORT, PANIC, FAIL, HASH = 1, 2, 4, 5, 6, 9, 11
PAGE = 4096


@contextmanager
def serving(folder, *options, vms=("a",)):
    """A backend on /dev/tee0; gives the sockets, and the events of its trace when it has ended."""
    sockets = [f"{folder}/{vm}.sock" for vm in vms]
    places = [word for vm, path in zip(vms, sockets, strict=True) for word in ("--socket-path", path, "--vm", vm)]
    trace = Path(folder) / "trace.json"
    command = [sys.executable, "-m", "virtio_tee", "serve", "--tee", "linux", *places, "--trace", str(trace), *options]
    backend = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    events = []
    try:
        line = backend.stderr.readline()
        assert "ready" in line, line + backend.stderr.read()
        yield sockets, events
    finally:
        backend.terminate()
        said = backend.communicate(timeout=30)[1]
        assert backend.returncode == 0, said
        events += json.loads(trace.read_text())


@contextmanager
def guest(path):
    """A context of a guest of its own."""
    with closing(open_driver(path, None)) as driver, TeeRuntime(driver) as runtime, Context(runtime) as context:
        yield context


def outcome(action, *arguments, **more):
    try:
        action(*arguments, **more)
    except TeeError as error:
        return [describe(error.code), error.origin]
    return "SUCCESS"


def scattered(context, shared):
    """The same memory as ``shared`` as a region of its own: its pages from the last to the first."""
    whole, pages = shared.memory, range(shared.size // PAGE)
    (one,) = whole.ranges
    order = [number * PAGE for number in reversed(pages)]
    ranges = [type(one)(one.address + at, PAGE) for at in order]
    memory = Memory([whole.view(at, PAGE) for at in order], ranges=ranges)
    done = context._runtime.call(RegisterMemory(context=context.handle, memory=memory))
    assert done.code == 0, done
    return memory


def placed(events):
    """How regions were used."""
    found = [(e["name"], e["args"].get("reason", "")) for e in events if e["name"].startswith("region ")]
    return sorted({f"{name} {reason}".strip(): found.count((name, reason)) for name, reason in found}.items())


def calls(path, found):
    """All kinds of parameters and ends."""
    with guest(path) as context, context.open_session(UUIDS["probe"]) as session:
        words = session.invoke(ADD, ValueIn(2**40, 1), ValueOut(), ValueInOut(2**50, 2))
        found["values"] = [words[1].c, words[2].c]
        found["temporary"] = session.invoke(XOR, TempInOut(b"\x01\x02\x03"), ValueIn(0xFF))[0].hex()
        large = bytes(range(256)) * 256
        found["large"] = session.invoke(XOR, TempInOut(large), ValueIn(0x5A))[0] == bytes(b ^ 0x5A for b in large)
        found["hash"] = session.invoke(HASH, TempIn(large), TempOut(32))[1] == hashlib.sha256(large).digest()
        with context.allocate(1 << 20) as shared:
            shared.write(b"\x0f" * (1 << 20))
            session.invoke(XOR, shared.part(INOUT, 5, 1000), ValueIn(0xFF))
            found["part"] = shared.read() == b"\x0f" * 5 + b"\xf0" * 1000 + b"\x0f" * ((1 << 20) - 1005)
            other = scattered(context, shared)
            session.invoke(XOR, SharedMemory(context, other, owned=False).whole(INOUT), ValueIn(0xFF))
            found["scattered"] = shared.read() == b"\xf0" * 5 + b"\x0f" * 1000 + b"\xf0" * ((1 << 20) - 1005)
            done = context._runtime.call(UnregisterMemory(context=context.handle, memory=other))
            found["unregistered"] = describe(done.code)
            shared.memory.read_only = True
            with_hash = Memory(shared.memory.segments, ranges=shared.memory.ranges, read_only=True)
            context._runtime.call(RegisterMemory(context=context.handle, memory=with_hash))
            digest = session.invoke(HASH, SharedMemory(context, with_hash, owned=False).whole(IN), TempOut(32))[1]
            found["read only"] = digest == hashlib.sha256(shared.read()).digest()
            context._runtime.call(UnregisterMemory(context=context.handle, memory=with_hash))
            shared.memory.read_only = False
        try:
            session.invoke(SHORT, TempOut(4), ValueIn(11))
        except TeeError as error:
            found["short"] = [describe(error.code), error.sizes[0]]
        found["null"] = outcome(session.invoke, 0, Null(OUT))
        found["fail"] = outcome(session.invoke, FAIL, ValueIn(0x10000001))
        found["no ta"] = outcome(context.open_session, "00000000-0000-0000-0000-00000000dead")
        found["user"] = outcome(context.open_session, UUIDS["probe"], login=Login.USER)
        token, began = CancelToken(), time.monotonic()
        waiting = session.begin(WAIT, ValueIn(0), cancel=token)
        time.sleep(0.3)
        token.cancel()
        found["cancel"] = outcome(waiting.wait, 20)
        found["cancelled soon"] = time.monotonic() - began < 15
        panicking = context.open_session(UUIDS["probe"])
        found["panic"] = outcome(panicking.invoke, PANIC)
        found["after"] = outcome(panicking.invoke, 0)


def nested():
    """With zero copy and without."""
    for options in ((), ("--no-zero-copy",)):
        found = {}
        with tempfile.TemporaryDirectory() as folder:
            with serving(folder, *options) as (sockets, events):
                calls(sockets[0], found)
            found["placed"] = placed(events)
        print(json.dumps({"options": options, **found}))


def many():
    """One guest has calls that never end; the others are served. When all have gone, nothing is left."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        vms = ("greedy", "b", "c")
        with serving(folder, vms=vms) as (sockets, events), ExitStack() as stack:
            contexts = [stack.enter_context(guest(path)) for path in sockets]
            sessions = [context.open_session(UUIDS["probe"]) for context in contexts]
            waiting = [sessions[0].begin(WAIT, ValueIn(0)) for _ in range(6)]
            found["others"] = [
                session.invoke(ADD, ValueIn(turn, 1), ValueOut(), ValueInOut(0))[1].c
                for turn in range(3)
                for session in sessions[1:]
            ]
            for one in reversed(waiting):  # none that waits gets the thread of one that was cancelled
                one.cancel()
            found["cancelled"] = [outcome(one.wait, 20) for one in waiting]
            sessions[0].begin(WAIT, ValueIn(0))  # the guest goes in the middle of it
            contexts[0]._context = None
        last = [event["args"] for event in events if event["name"] == "drained"][-1]
        found["left"] = {name: last[name] for name in ("calls", "contexts", "sessions", "registrations")}
    print(json.dumps(found))


@contextmanager
def brokered(folder, *vms):
    """A broker on /dev/teepriv0, with a store and no TAs, and a backend of its own for each VM; gives the sockets, and
    what the broker's trace says in the end: who was asked, and why."""
    trace, store = Path(folder) / "broker.json", Path(folder) / "store"
    store.mkdir()
    places = [word for vm in vms for word in ("--vm", f"{vm}={folder}/{vm}.broker")]
    command = [sys.executable, "-m", "virtio_tee", "broker", *places, "--trace", str(trace)]
    command += ["--fs-folder", str(store), "--ta-folder", str(store)]
    broker = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    told = []
    try:
        line = broker.stderr.readline()
        assert "ready" in line, line + broker.stderr.read()
        with ExitStack() as stack:
            sockets = []
            for vm in vms:
                where = Path(folder) / vm
                where.mkdir()
                options = ("--broker", f"{folder}/{vm}.broker")
                sockets += stack.enter_context(serving(where, *options, vms=(vm,)))[0]
            yield sockets, store, told
    finally:
        broker.terminate()
        said = broker.communicate(timeout=30)[1]
        assert broker.returncode == 0, said
        routed = [event for event in json.loads(trace.read_text()) if event.get("args", {}).get("route")]
        told += [[event["name"], event["args"]["route"]] for event in routed]


@contextmanager
def guest_with_tas(path, folder):
    """A guest whose own supplicant has the TAs of ``folder``, and nothing else."""
    from tee.io.supplicant import Supplicant

    supplicant = Supplicant([folder])
    with (
        closing(supplicant),
        closing(open_driver(path, None)) as driver,
        TeeRuntime(driver, supplicant) as runtime,
        Context(runtime) as context,
    ):
        yield context


def broker():
    """TAs come from the guest that opens them, what they store goes to the host."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "empty"
        empty.mkdir()
        with (
            brokered(folder, "a", "b") as (sockets, store, told),
            guest_with_tas(sockets[0], "/lib/optee_armtz") as a,
            guest_with_tas(sockets[1], empty) as b,
        ):
            found["without"] = outcome(b.open_session, UUIDS["hello_world"])
            with a.open_session(UUIDS["hello_world"]) as hello:
                found["hello"] = hello.invoke(0, ValueInOut(41))[0].a
            with a.open_session(UUIDS["secure_storage"]) as session:
                session.invoke(1, TempIn(b"name"), TempIn(b"what is to be kept"))
                found["kept"] = session.invoke(0, TempIn(b"name"), TempOut(100))[1].decode()
            found["stored"] = bool(list(store.rglob("*")))
    found["told"] = sorted({f"{name} {route}" for name, route in told})
    print(json.dumps(found))


globals()[sys.argv[1]]()
