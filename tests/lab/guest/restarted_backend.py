"""In the guest: one driver, one runtime, over the death and the next life of the backend."""

import json

from guest_driver.client import Context, ValueIn, ValueInOut
from tee.io.runtime import TeeRuntime
from tee.io.supplicant import Supplicant
from tee.results import TeeError, describe
from tee.soft.examples import UUIDS
from virtio_tee.attach import open_driver

WAIT = 4

driver = open_driver(None, None)
seen = {}
with TeeRuntime(driver, Supplicant(["/lib/optee_armtz"])) as runtime:
    context = Context(runtime)
    session = context.open_session(UUIDS["probe"])
    before = driver.config.epoch
    pending = session.begin(WAIT, ValueIn(0))
    print("waiting", flush=True)
    try:
        pending.wait(60)
        seen["in flight"] = "SUCCESS"
    except TeeError as error:
        seen["in flight"] = describe(error.code)
    try:
        session.invoke(0)
        seen["old session"] = "SUCCESS"
    except TeeError as error:
        seen["old session"] = describe(error.code)
    seen["epochs differ"] = driver.config.epoch != before
    with Context(runtime) as fresh, fresh.open_session(UUIDS["hello_world"]) as session:
        seen["fresh session"] = session.invoke(0, ValueInOut(1))[0].a
driver.close()
print(json.dumps(seen))
