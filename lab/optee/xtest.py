"""OP-TEE's own test suite: running it, and what it said."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from lab.cache import say
from lab.driven import DrivenGuest, GuestError, GuestProcess
from lab.optee.host import OpteeHost
from lab.optee.stacks import Stack
from lab.run import tail

SMOKE = ("1001", "1002", "1004", "4001", "6001")
DEBIANS_SUPPLICANT = ("tee-supplicant",)
SOCKET = "/run/tee.sock"
_TOTALS = re.compile(
    r"^(\d+) subtests? of which (\d+) failed\n"
    r"(\d+) test cases? of which (\d+) failed\n"
    r"(\d+) test cases? w(?:ere|as) skipped$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class XtestResult:
    cases: dict[str, str]  # name → OK or FAILED
    subtests: int
    failed_subtests: int
    skipped: int

    @property
    def failed(self) -> list[str]:
        return [name for name, verdict in self.cases.items() if verdict != "OK"]

    def __str__(self) -> str:
        said = f"{len(self.cases)} cases, {self.subtests} subtests, {self.failed_subtests} failed"
        return f"{said}: {' '.join(self.failed)}" if self.failed else said


def parse(text: str) -> XtestResult:
    """What xtest has written.

    :raises ValueError: it did not end as it does, or its totals are not those of its list
    """
    totals = list(_TOTALS.finditer(text))
    if not totals:
        raise ValueError("xtest did not come to its totals")
    subtests, failed_subtests, cases, failed, skipped = (int(number) for number in totals[-1].groups())
    listed = text[: totals[-1].start()].rpartition("Result of testsuite ")[2]
    verdicts = dict(re.findall(r"^(\w+_\d+) (OK|FAILED.*)$", listed, re.MULTILINE))
    result = XtestResult(verdicts, subtests, failed_subtests, skipped)
    if len(verdicts) != cases or len(result.failed) != failed:
        raise ValueError(f"xtest counts {cases} cases, {failed} failed, and lists {result}")
    return result


def run_xtest(where: DrivenGuest, cases: Sequence[str] = SMOKE, timeout: float = 600) -> XtestResult:
    """Run cases of the regression suite, or all. GuestError where it does not come to its end."""
    done = where.run(["xtest", "-t", "regression", "-l", "0", *cases], timeout=timeout, check=False)
    try:
        return parse(done.stdout)
    except ValueError as error:
        raise GuestError(f"{error}; the end of what it said:\n{tail(done.stdout + done.stderr)}") from error


@contextmanager
def supplicant(where: DrivenGuest, command: Sequence[str] = DEBIANS_SUPPLICANT) -> Iterator[GuestProcess]:
    """One that has its device open. GuestError where it ends before it is ended here."""
    started = where.spawn(command)
    try:
        opened = f"ls -l /proc/{started.pid}/fd | grep -q /dev/teepriv0"
        where.run(["sh", "-c", f"until {opened} || ! kill -0 {started.pid}; do sleep 0.1; done"])
        yield started
        if started.poll() is not None:
            raise GuestError(f"{' '.join(command)} has ended:\n{tail(started.stdout + started.stderr)}")
    finally:
        if started.poll() is None:
            started.kill()
            started.wait()


@dataclass(frozen=True)
class Comparison:
    stack: Stack
    native: XtestResult
    native_seconds: float
    guest: XtestResult
    guest_seconds: float

    @property
    def is_good(self) -> bool:
        """Nothing failed, and the guest ran what the host did."""
        same = self.native.cases == self.guest.cases and self.native.subtests == self.guest.subtests
        return same and not self.native.failed and not self.guest.failed

    def __str__(self) -> str:
        return (
            f"{self.stack.name}: xtest natively: {self.native}, {self.native_seconds:.0f} s;"
            f" in a guest through virtio-tee: {self.guest}, {self.guest_seconds:.0f} s"
        )


def compare(stack: Stack, cases: Sequence[str] = SMOKE) -> Comparison:
    """The cases in the host VM, and then in a guest VM whose TEE is that one by `virtio-tee serve --tee linux`."""
    with OpteeHost(stack) as host, supplicant(host):
        say(f"{stack.name} is up after {host.boot_seconds:.1f} s")
        native, native_seconds = _timed(host, cases)
        say(f"natively: {native}")
        with host.served(SOCKET, "--tee", "linux"), host.guest([SOCKET]) as guest, supplicant(guest):
            say(f"the guest is up after {guest.boot_seconds:.1f} s")
            return Comparison(stack, native, native_seconds, *_timed(guest, cases))


def _timed(where: DrivenGuest, cases: Sequence[str]) -> tuple[XtestResult, float]:
    began = time.monotonic()
    return run_xtest(where, cases, timeout=1800), time.monotonic() - began
