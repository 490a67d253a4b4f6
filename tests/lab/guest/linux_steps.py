"""In a guest whose kernel drives the device: one step of a test each. The last line of output is JSON."""

import hashlib
import json
import mmap
import os
import sys
import threading
import time

from tee.io.linux import LinuxTee
from tee.io.linux_supplicant import LinuxSupplicant
from tee.io.supplicant import Supplicant
from tee.linux.ioctls import MEMREF_NULL
from tee.results import describe
from tee.soft.examples import UUIDS

NULL, XOR, WAIT, HOLD, HASH = 0, 2, 4, 8, 11
FOREVER = 3_600_000


def tell(**what):
    print(json.dumps(what), flush=True)


def error_of(action, *args):
    try:
        action(*args)
    except OSError as error:
        return error.strerror
    return None


def opened(name):
    tee = LinuxTee()
    answer = tee.open_session(UUIDS[name].bytes)
    return tee, answer


def hello():
    """A session with the TA, and one call."""
    began = time.monotonic()
    tee, answer = opened("hello_world")
    if answer.code:
        tell(open=describe(answer.code), seconds=time.monotonic() - began)
        return
    value = tee.invoke(answer.session, 0, [(3, 41, 0, 0)]).params[0][1]
    tell(open="SUCCESS", value=value)


def hold():
    """A call that does not end by itself, with 4 MiB of memory."""
    tee, answer = opened("probe")
    data = mmap.mmap(-1, 4 << 20)
    shm = tee.register(data)
    print("holding", flush=True)
    tee.invoke(answer.session, HOLD, [(7, 0, 4 << 20, shm.id), (3, FOREVER, 0, 0)])


def lose():
    """What becomes of a call, a session and memory when the device goes or loses its state."""
    tee, answer = opened("probe")
    shm = tee.allocate(5000)
    found = {}

    def wait():
        found["in flight"] = describe(tee.invoke(answer.session, WAIT, [(1, 0, 0, 0)]).code)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.3)
    print("holding", flush=True)
    thread.join()
    found["old session"] = describe(tee.invoke(answer.session, NULL).code)
    found["with memory"] = describe(tee.invoke(answer.session, XOR, [(7, 0, 10, shm.id), (1, 1, 0, 0)]).code)
    found["more memory"] = error_of(tee.allocate, 5000)
    found["close"] = error_of(tee.close_session, answer.session)
    shm.close()
    tee.close()
    tell(**found)


def many():
    """Calls of many threads at a time, each with memory of its own; sessions and memory come and go."""
    wrong = []

    def work(number):
        tee, answer = opened("probe")
        for turn in range(8):
            size = 1000 * number + 77 * turn + 1
            data = mmap.mmap(-1, size)
            data[:] = bytes(i & 0xFF for i in range(size))
            shm = tee.register(data) if turn % 2 else tee.allocate(size)
            view = shm.data[:size]
            view[:] = data[:]
            code = tee.invoke(answer.session, XOR, [(7, 0, size, shm.id), (1, 0xA5, 0, 0)]).code
            if code or bytes(view) != bytes(i & 0xFF ^ 0xA5 for i in range(size)):
                wrong.append((number, turn, code))
            del view
            shm.close()
        tee.close_session(answer.session)
        tee.close()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tell(wrong=wrong)


def untouched():
    """What a client writes into shared memory stays: beside the part that a call uses meanwhile, and at the end."""
    tee, answer = opened("probe")
    data = mmap.mmap(-1, 4 * mmap.PAGESIZE)
    shm = tee.register(data)
    found = []

    def hold():
        found.append(tee.invoke(answer.session, HOLD, [(7, 0, 100, shm.id), (3, 500, 0, 0)]).code)

    thread = threading.Thread(target=hold)
    thread.start()
    time.sleep(0.2)
    data[100:] = b"\x11" * (len(data) - 100)
    thread.join()
    beside = data[100:] == b"\x11" * (len(data) - 100)
    given = [(5, 100, 100, shm.id), (6, 8192, 32, shm.id)]
    found.append(tee.invoke(answer.session, HASH, given).code)
    hashed = data[8192:8224] == hashlib.sha256(b"\x11" * 100).digest()
    data[:] = b"\x22" * len(data)
    shm.close()
    tee.close()
    tell(codes=found, beside=beside, hashed=hashed, afterwards=data[:] == b"\x22" * len(data))


def second_supplicant():
    """There is room for one."""
    tell(error=error_of(LinuxSupplicant, Supplicant([])))


def stuck_supplicant():
    """A supplicant that takes the LOAD_TA with the TEE's memory, and never answers."""

    class Stuck(LinuxSupplicant):
        def _serve(self, command, raw):
            if command == 0 and raw[1][3] != MEMREF_NULL:
                print("stuck", flush=True)
                time.sleep(3600)
            return super()._serve(command, raw)

    Stuck(Supplicant(["/lib/optee_armtz"])).run(lambda: print("holding", flush=True))


def late_supplicant():
    """A supplicant that answers its first LOAD_TA with memory after the device's deadline of 10 s."""

    class Late(LinuxSupplicant):
        said = False

        def _serve(self, command, raw):
            if command == 0 and raw[1][3] != MEMREF_NULL and not self.said:
                time.sleep(12)
                self.said = True
                print("late", flush=True)
            return super()._serve(command, raw)

    Late(Supplicant(["/lib/optee_armtz"])).run(lambda: print("holding", flush=True))


def plain_supplicant():
    """A supplicant that answers one request after another, without META parameters."""
    LinuxSupplicant(Supplicant(["/lib/optee_armtz"]), meta=False).run(lambda: print("holding", flush=True))


def available():
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))


def killed_clients():
    """Clients that are killed in calls, with more memory altogether than could be lost unnoticed."""
    before = available()
    for _ in range(15):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            tee, answer = opened("probe")
            data = mmap.mmap(-1, 8 << 20)
            shm, more = tee.register(data), tee.allocate(1 << 20)
            data[:] = bytes(len(data))
            os.write(writing, b"x")
            tee.invoke(answer.session, HOLD, [(7, 0, 8 << 20, shm.id), (3, FOREVER, 0, 0), (7, 0, 1 << 20, more.id)])
            os._exit(1)
        os.read(reading, 1)
        time.sleep(0.1)
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)
    time.sleep(1)
    tell(lost_mib=max(0, before - available()) >> 10)


def bad_supplicant():
    """A supplicant that answers what makes no sense."""
    tee = LinuxTee("/dev/teepriv0")
    found = {"nothing asked": error_of(tee.send, 0, [(0x103, 1, 0, 0)])}
    print("holding", flush=True)
    room = [(0x100, 0, 0, 0)] + [(0, 0, 0, 0)] * 4
    command, raw = tee.receive(room)
    found["first"] = command
    found["other request"] = error_of(tee.send, 0, [(0x103, 999, 0, 0), *raw[1:]])
    found["too few"] = error_of(tee.send, 0, raw[:-1])
    tee.send(0, [raw[0], raw[1], (raw[2][0], 0, 100, 0)])  # the TA has 100 bytes
    command, raw = tee.receive(room)
    found["second"] = command
    tee.send(0, [raw[0], (raw[1][0], 0, 0, 12345)])  # memory that there is not
    found["twice"] = error_of(tee.send, 0, [raw[0], (raw[1][0], 0, 0, 12345)])
    tell(**found)


def abuse():
    """System calls that make no sense."""
    tee, answer = opened("probe")
    found = {
        "no session": describe(tee.invoke(999, NULL).code),
        "close": error_of(tee.close_session, 999),
        "close none": error_of(tee.close_session, 0),
        "unknown type": error_of(tee.invoke, answer.session, NULL, [(4, 0, 0, 0)]),
        "unknown bits": error_of(tee.invoke, answer.session, NULL, [(0x10001, 0, 0, 0)]),
        "no memory": error_of(tee.invoke, answer.session, NULL, [(7, 0, 1, 77)]),
        "kernel login": error_of(lambda: tee.open_session(UUIDS["probe"].bytes, login=0x80000000)),
        "strange login": error_of(lambda: tee.open_session(UUIDS["probe"].bytes, login=77)),
        "nothing": error_of(tee.allocate, 0),
        "too much": error_of(tee.allocate, 1 << 40),
        "far too much": error_of(tee.allocate, (1 << 64) - 1),
        "null": describe(tee.invoke(answer.session, NULL, [(7, 55, 10, MEMREF_NULL)]).code),
        "meta": describe(tee.invoke(answer.session, NULL, [(0x103, 1, 2, 3)]).code),
    }
    other = LinuxTee()
    shm = other.allocate(100)
    found["another's memory"] = error_of(tee.invoke, answer.session, NULL, [(7, 0, 1, shm.id)])
    found["another's session"] = describe(other.invoke(answer.session, NULL).code)
    tell(**found)


def contexts():
    """More clients than the device takes; all are closed again."""
    held = []
    try:
        while len(held) < 2000:
            held.append(LinuxTee())
        refused = None
    except OSError as error:
        refused = error.strerror
    count = len(held)
    for tee in held:
        tee.close()
    again = LinuxTee()
    again.close()
    tell(count=count, refused=refused)


def once():
    """One call with a value and memory, as the device wants to have it answered."""
    found = {}
    try:
        tee, answer = opened("probe")
        found["session"] = describe(answer.code)
        shm = tee.allocate(100)
        done = tee.invoke(answer.session, NULL, [(7, 8, 10, shm.id), (3, 5, 6, 7)])
        found["call"] = describe(done.code)
        found["same"] = done.params == [(7, 8, 10, shm.id), (3, 5, 6, 7)]
        more = tee.allocate(100)
        more.close()
        shm.close()
        tee.close()
    except OSError as error:
        found["error"] = error.strerror
    tell(**found)


def stay():
    """A call that the device never answers; much other memory is registered."""
    tee, answer = opened("probe")
    others = [tee.allocate(100) for _ in range(20)]
    shm = tee.allocate(100)
    print("holding", flush=True)
    tee.invoke(answer.session, NULL, [(7, 8, 10, shm.id)])
    tell(others=len(others))


os.environ.setdefault("PYTHONUNBUFFERED", "1")
globals()[sys.argv[1]](*sys.argv[2:])
