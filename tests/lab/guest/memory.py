"""In the guest: values, temporary and registered memory in all directions, from 0 bytes to 16 MiB."""

import json

from guest_driver.client import Context, Null, TempIn, TempInOut, TempOut, ValueIn, ValueInOut, ValueOut
from guest_driver.core import DRIVER_FEATURES, VirtioTeeDriver
from guest_driver.virtio_pci import PciTransport, find
from tee.io.runtime import TeeRuntime
from tee.io.supplicant import Supplicant
from tee.params import Direction
from tee.results import TeeError, describe
from tee.soft.examples import UUIDS

ADD, XOR, TOUCH, SHORT, ECHO = 1, 2, 3, 5, 7
BIG = 16 << 20

transport = PciTransport(find()[0], wanted=int(DRIVER_FEATURES), memory_bytes=42 << 20)
driver = VirtioTeeDriver(transport)
seen = {}
with (
    TeeRuntime(driver, Supplicant(["/lib/optee_armtz"])) as runtime,
    Context(runtime) as context,
    context.open_session(UUIDS["probe"]) as session,
):
    _, out, inout = session.invoke(ADD, ValueIn(2**40, 1), ValueOut(), ValueInOut(2**50, 2))
    seen["add"] = [out.c, inout.c]
    seen["xor"] = {}
    for size in (0, 1, 4096, 65536 - 8, 1 << 20):
        data = session.invoke(XOR, TempInOut(b"\x0f" * size), ValueIn(0xFF))[0]
        seen["xor"][size] = data == b"\xf0" * size
    with context.allocate(BIG) as shared:
        session.invoke(TOUCH, shared.whole(Direction.INOUT))
        view = shared.read()
        seen["touched"] = [view[::4096] == b"\1" * (BIG // 4096), sum(view) == BIG // 4096]
        # a part of it, over the border of two pages
        session.invoke(XOR, shared.part(Direction.INOUT, 4090, 12), ValueIn(0x80))
        seen["part"] = shared.read(4088, 16).hex()
    try:
        session.invoke(SHORT, TempOut(10), ValueIn(11))
    except TeeError as error:
        seen["short"] = [describe(error.code), error.sizes[0]]
    seen["echo"] = list(
        session.invoke(ECHO, ValueOut(), Null(), TempIn(b"abc"), ValueIn(), TempOut(5), ValueInOut())[0]
    )
driver.close()
print(json.dumps(seen))
