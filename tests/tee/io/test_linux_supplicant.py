"""The supplicant of a Linux TEE device, over a device that is a table of requests."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tee.io import linux_supplicant
from tee.io.linux import RawParam
from tee.io.linux_supplicant import LinuxSupplicant
from tee.io.supplicant import Supplicant
from tee.linux.ioctls import IMPL_OPTEE, MEMREF_NULL
from tee.results import Result
from tee.rpc import RpcCommand
from tee.soft.examples import UUIDS

TA = b"a TA of some bytes"
UUID = UUIDS["random"]
NAME = (1, int.from_bytes(UUID.bytes[:8], "little"), int.from_bytes(UUID.bytes[8:], "little"), 0)


class FakeShm:
    def __init__(self, ident: int, size: int) -> None:
        self.id = ident
        self.data = memoryview(bytearray(size))
        self.closed = False

    def close(self) -> None:
        self.closed = True


class FakeDevice:
    """Asks what is in ``requests``; keeps the answers and the memory."""

    impl_id = IMPL_OPTEE

    def __init__(self, path: str = "") -> None:
        self.requests: list[tuple[int, list[RawParam]]] = []
        self.answers: list[tuple[int, list[RawParam]]] = []
        self.shms: list[FakeShm] = []
        self.closed = False
        self.refusal = 0

    def version(self) -> tuple[int, int, int]:
        return self.impl_id, 0, 0

    def allocate(self, size: int) -> FakeShm:
        if size > 1 << 20:
            raise OSError(errno.ENOMEM, "no")
        self.shms.append(FakeShm(len(self.shms) + 7, -(-size // 4096) * 4096))
        return self.shms[-1]

    def receive(self, params: list[RawParam]) -> tuple[int, list[RawParam]]:
        if not self.requests:
            raise OSError(errno.ENODEV, "gone")
        command, asked = self.requests.pop(0)
        self.meta: list[RawParam] = [(0x103, 4711, 0, 0)] if params[0][0] == 0x100 else []
        return command, [*self.meta, *asked]

    def send(self, code: int, params: list[RawParam]) -> None:
        assert params[: len(self.meta)] == self.meta
        if self.refusal:
            raise OSError(self.refusal, "nobody waits for it")
        self.answers.append((code, params[len(self.meta) :]))

    def close(self) -> None:
        self.closed = True


@pytest.fixture(params=[True, False], ids=["meta", "plain"])
def serving(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> LinuxSupplicant:
    monkeypatch.setattr(linux_supplicant, "LinuxTee", FakeDevice)
    monkeypatch.setattr(linux_supplicant, "Shm", FakeShm)
    (tmp_path / f"{UUID}.ta").write_bytes(TA)
    return LinuxSupplicant(Supplicant([tmp_path]), meta=request.param)


def asked(serving: LinuxSupplicant, *requests: tuple[int, list[RawParam]]) -> list[tuple[int, list[RawParam]]]:
    device = serving._device
    assert isinstance(device, FakeDevice)
    device.requests, device.answers = list(requests), []
    serving.run()
    return device.answers


def test_a_ta_is_loaded_as_optee_does_it(serving: LinuxSupplicant) -> None:
    size, memory = asked(
        serving,
        (RpcCommand.LOAD_TA, [NAME, (6, 0, 0, MEMREF_NULL)]),
        (RpcCommand.SHM_ALLOC, [(3, 0, len(TA), 0)]),
    )
    assert size == (Result.SUCCESS, [NAME, (6, 0, len(TA), MEMREF_NULL)])
    assert memory == (Result.SUCCESS, [(3, 0, len(TA), 7)])
    loaded, freed = asked(
        serving,
        (RpcCommand.LOAD_TA, [NAME, (6, 0, len(TA), 7)]),
        (RpcCommand.SHM_FREE, [(3, 0, 7, 0)]),
    )
    assert loaded == (Result.SUCCESS, [NAME, (6, 0, len(TA), 7)])
    assert freed == (Result.SUCCESS, [(3, 0, 7, 0)])
    device = serving._device
    assert isinstance(device, FakeDevice)
    assert bytes(device.shms[0].data[: len(TA)]) == TA
    assert device.shms[0].closed


@pytest.mark.parametrize(
    ("command", "params", "code"),
    [
        (RpcCommand.SHM_ALLOC, [(3, 0, 2 << 20, 0)], Result.OUT_OF_MEMORY),
        (RpcCommand.SHM_ALLOC, [(3, 1, 10, 0)], Result.BAD_PARAMETERS),
        (RpcCommand.SHM_FREE, [(3, 0, 99, 0)], Result.BAD_PARAMETERS),
        (RpcCommand.LOAD_TA, [NAME, (6, 0, 10, 99)], Result.BAD_PARAMETERS),
        (RpcCommand.LOAD_TA, [NAME, (77, 0, 10, 99)], Result.BAD_PARAMETERS),
        (RpcCommand.LOAD_TA, [(1, 5, 5, 0), (6, 0, 0, MEMREF_NULL)], Result.ITEM_NOT_FOUND),
        (RpcCommand.RPMB, [], Result.NOT_SUPPORTED),
        (4711, [(0, 0, 0, 0)], Result.NOT_SUPPORTED),
    ],
)
def test_what_is_refused(serving: LinuxSupplicant, command: int, params: list[RawParam], code: Result) -> None:
    """With as many parameters as were asked with: the kernel takes no other answer."""
    (answer,) = asked(serving, (command, params))
    assert answer == (code, params)


def test_another_kind_of_tee_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux_supplicant, "LinuxTee", FakeDevice)
    monkeypatch.setattr(FakeDevice, "impl_id", 2)
    with pytest.raises(ValueError, match="another kind"):
        LinuxSupplicant(Supplicant([]))


def test_other_errors_are_told(serving: LinuxSupplicant, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object, params: list[RawParam]) -> tuple[int, list[RawParam]]:
        raise OSError(errno.EINVAL, "broken")

    monkeypatch.setattr(FakeDevice, "receive", broken)
    with pytest.raises(OSError, match="broken"):
        serving.run()


@pytest.mark.parametrize("number", [errno.EBADF, errno.ENOENT, errno.EINVAL])
def test_a_client_was_killed(serving: LinuxSupplicant, number: int) -> None:
    """The answer is refused, memory goes back, and the next client is served."""
    device = serving._device
    assert isinstance(device, FakeDevice)
    device.refusal = number
    assert asked(serving, (RpcCommand.SHM_ALLOC, [(3, 0, len(TA), 0)]), (RpcCommand.RPMB, [])) == []
    assert [shm.closed for shm in device.shms] == [True]
    device.refusal = 0
    assert asked(serving, (RpcCommand.LOAD_TA, [NAME, (6, 0, 0, MEMREF_NULL)])) == [
        (Result.SUCCESS, [NAME, (6, 0, len(TA), MEMREF_NULL)])
    ]


def test_the_device_goes_before_the_answer(serving: LinuxSupplicant) -> None:
    device = serving._device
    assert isinstance(device, FakeDevice)
    device.refusal = errno.ENODEV
    assert asked(serving, (RpcCommand.RPMB, []), (RpcCommand.RPMB, [])) == []
    assert len(device.requests) == 1
