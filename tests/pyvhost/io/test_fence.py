"""The machine's fences can be called, and there is something behind them."""

from __future__ import annotations

import ctypes
import platform

import pytest

from pyvhost.io import fence


@pytest.fixture(autouse=True)
def fresh() -> None:
    fence.host_fences.cache_clear()


def test_host_fences() -> None:
    fences = fence.host_fences()
    fences.full()
    assert (fences.order is None) == (platform.machine() == "x86_64")


def test_a_lock_will_do_on_x86_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fence, "_libatomic", lambda: None)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    fence.host_fences().full()
    fence.host_fences.cache_clear()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(RuntimeError, match="libatomic"):
        fence.host_fences()


def test_weak_machines_order_too(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[ctypes.c_int] = []
    monkeypatch.setattr(fence, "_libatomic", lambda: calls.append)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    fences = fence.host_fences()
    fences.full()
    assert fences.order is not None
    fences.order()
    assert [call.value for call in calls] == [5, 4]
