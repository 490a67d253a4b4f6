"""The partition answers what OP-TEE 4.10 answered to Linux's driver, where the answer is no matter of what it holds."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path as File

from ffa.abi.ids import Call, name
from ffa.optee.msg import MAX_NOTIFICATION, Capability, Service
from tests.ffa.optee.bench import Path

TRACE = File(__file__).resolve().parents[2] / "data/ffa/linux-7.2-optee-4.10-boot-probe-xtest1001.jsonl"
SERVICES = {Service.GET_API_VERSION, Service.GET_OS_VERSION, Service.EXCHANGE_CAPABILITIES, Service.ENABLE_ASYNC_NOTIF}


def test_blocking_calls_as_recorded() -> None:
    path = Path()
    vm = path.guests[0].endpoint
    lines = [json.loads(line) for line in TRACE.read_text().splitlines()]
    calls = [line for line in lines if "NS" in (line["from"], line["to"])]
    seen = set()
    for asked, answered in pairwise(calls):
        x, recorded = ([int(word, 16) for word in line["x"]] for line in (asked, answered))
        if name(x[0]) != "FFA_MSG_SEND_DIRECT_REQ" or x[3] not in SERVICES:
            continue
        seen.add(x[3])
        ours = vm.call(Call.MSG_SEND_DIRECT_REQ, vm.id << 16 | path.partition.id, 0, *x[3:8])[3:8]
        wanted = recorded[3:8]
        if x[3] == Service.EXCHANGE_CAPABILITIES:  # it is built without hardware that could be probed for RPMB
            wanted[2] &= ~Capability.RPMB_PROBE
            wanted[3] = MAX_NOTIFICATION  # the recorded one gives none
        assert list(ours) == wanted, asked["note"]
    assert seen == SERVICES
