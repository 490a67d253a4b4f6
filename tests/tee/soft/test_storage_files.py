"""The secure storage with the real supplicant of this repository, over real files."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

import pytest

from tee.calls import Invoke, OpenContext, OpenSession
from tee.io.runtime import TeeRuntime
from tee.io.supplicant import Services
from tee.memory import Memory
from tee.params import Direction, MemRef, Param
from tee.results import Result
from tee.soft import SoftTee, examples

KEY = bytes(range(32))
STORAGE = examples.UUIDS["secure_storage"]


def ref(direction: Direction, data: bytearray) -> MemRef:
    return MemRef(direction, Memory.of(data), 0, len(data))


class Life:
    """One life of a TEE, with a client."""

    def __init__(self, folder: Path | None) -> None:
        tee = SoftTee(clock=time.monotonic, random=secrets.token_bytes, built_in=examples.built_in(), storage_key=KEY)
        services = Services(fs_folder=str(folder) if folder is not None else "", fs_sync=False)
        self.supplicant = services.supplicant()
        self.runtime = TeeRuntime(tee, self.supplicant)

    def __enter__(self) -> Life:
        self.runtime.__enter__()
        context = self.runtime.submit(OpenContext()).wait(10).value
        self.session = self.runtime.submit(OpenSession(context=context, uuid=STORAGE)).wait(10).value
        return self

    def __exit__(self, *error: object) -> None:
        self.runtime.__exit__(None, None, None)
        self.supplicant.close()

    def invoke(self, func: int, *params: Param) -> int:
        return self.runtime.submit(Invoke(session=self.session, func=func, params=list(params))).wait(10).code

    def put(self, name: bytes, data: bytes) -> int:
        return self.invoke(1, ref(Direction.IN, bytearray(name)), ref(Direction.IN, bytearray(data)))

    def get(self, name: bytes, size: int) -> tuple[int, bytes]:
        out = bytearray(size)
        return self.invoke(0, ref(Direction.IN, bytearray(name)), ref(Direction.OUT, out)), bytes(out)


@pytest.mark.parametrize("size", [1, 7000, 300_000])
def test_objects_outlive_the_tee(tmp_path: Path, size: int) -> None:
    data = secrets.token_bytes(size)
    with Life(tmp_path) as life:
        assert life.put(b"object#1", data) == Result.SUCCESS
        assert life.put(b"object#1", data) == Result.SUCCESS
        assert life.get(b"object#1", size) == (Result.SUCCESS, data)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2
    with Life(tmp_path) as life:
        assert life.get(b"object#1", size) == (Result.SUCCESS, data)
        assert life.invoke(2, ref(Direction.IN, bytearray(b"object#1"))) == Result.SUCCESS
        assert life.get(b"object#1", size)[0] == Result.ITEM_NOT_FOUND


def test_a_file_that_was_changed(tmp_path: Path) -> None:
    with Life(tmp_path) as life:
        assert life.put(b"a", b"1234") == Result.SUCCESS
        for path in tmp_path.rglob("*"):
            if path.is_file():
                data = path.read_bytes()
                path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert life.get(b"a", 4)[0] == Result.CORRUPT_OBJECT


def test_a_supplicant_without_files() -> None:
    with Life(None) as life:
        assert life.put(b"a", b"1234") == Result.STORAGE_NOT_AVAILABLE
