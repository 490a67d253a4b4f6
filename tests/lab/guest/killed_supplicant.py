"""In the guest: a supplicant process is stopped and killed while the TEE waits for its LOAD_TA, then started again."""

import json
import os
import signal
import threading

from guest_driver.client import Context, ValueInOut
from tee.io.runtime import TeeRuntime
from tee.io.supplicant_process import SupplicantProcess
from tee.results import TeeError, describe
from tee.soft.examples import UUIDS
from virtio_tee.attach import open_driver

asked = threading.Event()


def observe(seen):
    if seen.kind == "rpc":
        asked.set()


driver = open_driver(None, None)
supplicant = SupplicantProcess(["/lib/optee_armtz"])
supplicant.start()
answers = {}
with TeeRuntime(driver, supplicant, observe) as runtime, Context(runtime) as context:
    os.kill(supplicant.pid, signal.SIGSTOP)

    def kill():
        asked.wait(30)
        supplicant.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        context.open_session(UUIDS["hello_world"])
        answers["killed"] = "SUCCESS"
    except TeeError as error:
        answers["killed"] = describe(error.code)
    killer.join()
    try:
        context.open_session(UUIDS["hello_world"])
        answers["absent"] = "SUCCESS"
    except TeeError as error:
        answers["absent"] = describe(error.code)
    supplicant.start()
    with context.open_session(UUIDS["hello_world"]) as session:
        answers["again"] = session.invoke(0, ValueInOut(1))[0].a
supplicant.close()
driver.close()
print(json.dumps(answers))
