"""In the guest: every example TA, loaded over RPC. What they answer is judged on the host.

Arguments: what to do (call, store, read), the folder of the TEE's files.
"""

import json
import sys

from guest_driver.client import Context, TempIn, TempInOut, TempOut, ValueIn, ValueInOut, ValueOut
from tee.io.runtime import TeeRuntime
from tee.io.supplicant import Services
from tee.results import TeeError, describe
from tee.soft.examples import UUIDS
from virtio_tee.attach import open_driver

SECRET = b"what nobody may read, " * 300
NAME = b"the name of the object"


def code_of(session, *arguments):
    try:
        session.invoke(*arguments)
    except TeeError as error:
        return describe(error.code)
    return "SUCCESS"


def hello_world(session):
    return [session.invoke(command, ValueInOut(given))[0].a for command, given in ((0, 41), (1, 41), (0, 2**32 - 1))]


def random(session):
    return [session.invoke(0, TempOut(8192))[0].hex() for _ in range(2)]


def probe(session):
    _, out, inout = session.invoke(1, ValueIn(2**40, 1), ValueOut(), ValueInOut(2**50, 2))
    return [out.c, inout.c, session.invoke(2, TempInOut(b"Tee"), ValueIn(0x20))[0].decode()]


def aes(session):
    """NIST SP 800-38A and, with the example's fixed nonce, GCM: asked for by the host on standard input."""
    answers = []
    for one in json.load(sys.stdin):
        key, text = bytes.fromhex(one["key"]), bytes.fromhex(one["text"])
        session.invoke(0, ValueIn(one["algorithm"]), ValueIn(len(key)), ValueIn(one["encrypt"]))
        session.invoke(1, TempIn(key))
        if "iv" in one:
            session.invoke(2, TempIn(bytes.fromhex(one["iv"])))
            answers.append(session.invoke(3, TempIn(text), TempOut(len(text)))[1].hex())
        else:
            _, sealed, _, tag = session.invoke(4, TempIn(text), TempOut(len(text)), ValueIn(1), TempInOut(bytes(16)))
            answers.append((sealed + tag).hex())
    return answers


def hotp(session):
    session.invoke(0, TempIn(b"12345678901234567890"))
    return [session.invoke(1, ValueOut())[0].a for _ in range(10)]


def acipher(session):
    """[what a text becomes, twice, and back] for each padding; then whether another key opens it."""
    found = {}
    session.invoke(0, ValueIn(2048))
    for algorithm in (0x60000130, 0x60210230, 0x60410230):
        kind = ValueIn(algorithm)
        one, two = (session.invoke(1, TempIn(b"teststring"), TempOut(256), ValueIn(1), kind)[1] for _ in range(2))
        back = session.invoke(1, TempIn(one), TempOut(256), ValueIn(0), kind)[1]
        found[f"{algorithm:#x}"] = [one.hex(), two.hex(), back.decode()]
    session.invoke(0, ValueIn(2048))
    found["another key"] = code_of(session, 1, TempIn(one), TempOut(256), ValueIn(0), kind)
    return found


def secure_storage(session):
    content = b"content" * 9
    session.invoke(1, TempIn(b"passing"), TempIn(content))
    back = session.invoke(0, TempIn(b"passing"), TempOut(100))[1] == content
    session.invoke(2, TempIn(b"passing"))
    return [back, code_of(session, 0, TempIn(b"passing"), TempOut(100))]


def ocall(session):
    """The TA has its client add, with values and in memory that the client allocates; then by generic RPC."""

    def handler(asked):
        if asked.function == 1:
            asked.value(0).c = asked.value(0).a + asked.value(0).b
        else:
            asked.memory(0).write(b"\1" * asked.memory(0).capacity)

    added = session.invoke(0, ValueInOut(1), ValueInOut(40, 2), ocalls=handler)[1].c
    lent = session.invoke(1, ValueInOut(2, 5000), ocalls=handler)[0].c
    generic = session.invoke(2, ValueInOut(1), ValueInOut(30, 4), ocalls=handler)[1].c
    return [added, lent, generic, code_of(session, 0, ValueInOut(1))]


def stage(session):
    """It is for enclaves: a session can do nothing with it."""
    return code_of(session, 0)


CALLS = (hello_world, random, probe, aes, hotp, acipher, secure_storage, ocall, stage)


def call(context):
    answers = {}
    for example in CALLS:
        with context.open_session(UUIDS[example.__name__]) as session:
            answers[example.__name__] = example(session)
    return answers


def store(context):
    with context.open_session(UUIDS["secure_storage"]) as session:
        session.invoke(1, TempIn(NAME), TempIn(SECRET))
    return read(context)


def read(context):
    with context.open_session(UUIDS["secure_storage"]) as session:
        return {"same": session.invoke(0, TempIn(NAME), TempOut(len(SECRET)))[1] == SECRET}


what, folder = sys.argv[1:]
driver = open_driver(None, None)
supplicant = Services(ta_folders=("/lib/optee_armtz",), fs_folder=folder).supplicant()
with TeeRuntime(driver, supplicant) as runtime, Context(runtime) as context:
    answers = {"call": call, "store": store, "read": read}[what](context)
supplicant.close()
driver.close()
print(json.dumps(answers))
