"""In the guest: a call that never ends by itself, with a region of 16 MiB; and one more that waits in an RPC."""

import sys
import threading
import time

from guest_driver.client import Context, ValueIn
from guest_driver.core import DRIVER_FEATURES, VirtioTeeDriver
from guest_driver.virtio_pci import PciTransport, find
from tee.io.runtime import TeeRuntime
from tee.params import Direction
from tee.soft.examples import UUIDS


class SlowSupplicant:
    """Serves the first TA, then nothing any more."""

    def __init__(self, inner):
        self.inner, self.slow = inner, False

    def serve(self, rpc, allocator):
        while self.slow:
            time.sleep(1)
        return self.inner.serve(rpc, allocator)

    def forget(self, memory):
        self.inner.forget(memory)

    def close(self):
        self.inner.close()


def main():
    from tee.io.supplicant import Supplicant

    transport = PciTransport(find()[0], wanted=int(DRIVER_FEATURES), memory_bytes=36 << 20)
    supplicant = SlowSupplicant(Supplicant(["/lib/optee_armtz"]))
    runtime = TeeRuntime(VirtioTeeDriver(transport), supplicant)
    context = Context(runtime)
    session = context.open_session(UUIDS["probe"])
    shared = context.allocate(16 << 20)
    shared.write(b"\xa5" * 4096)
    session.begin(8, shared.whole(Direction.INOUT), *hold_for())
    session.begin(4, ValueIn(0))
    supplicant.slow = True
    threading.Thread(target=lambda: context.open_session(UUIDS["hello_world"]), daemon=True).start()
    time.sleep(1)
    print("holding", flush=True)
    time.sleep(3600)


def hold_for():
    from guest_driver.client import ValueInOut

    return (ValueInOut(3_600_000),)


sys.exit(main())
