"""`python -m lab.optee`: a real OP-TEE in a virtual machine."""

from __future__ import annotations

import argparse
import json
import sys
import time

from lab.cache import LabError, say
from lab.driven import DrivenGuest, GuestError
from lab.optee.firmware import ensure_firmware
from lab.optee.host import OpteeHost, boot_host_for_person
from lab.optee.image import guest_image, host_image
from lab.optee.stacks import DEFAULT, STACKS, Stack, with_stats
from lab.optee.xtest import SMOKE, compare

EPILOG = "stacks: " + "; ".join(f"{stack.name}, {stack.does}" for stack in STACKS.values())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lab.optee",
        description="An arm64 machine with a secure world, emulated: OP-TEE below Linux. Everything is kept in"
        " ${VIRTIO_TEE_CACHE:-~/.cache/virtio-tee}.",
        epilog=EPILOG,
    )
    sub = parser.add_subparsers(dest="command", required=True)
    text = "build firmware, kernel and initramfs of one stack, or of all, and the QEMU that runs in it"
    one = sub.add_parser("build", help=text, description=text, epilog=EPILOG)
    one.add_argument("--stack", choices=[*STACKS, "all"], default="all", help="default: %(default)s")
    one.add_argument("--stats", action="store_true", help="with OP-TEE's statistics")
    text = "boot it; without --shell, until its agent answers, then say how long it took"
    one = sub.add_parser("boot", help=text, description=text, epilog=EPILOG)
    one.add_argument("--stack", choices=STACKS, default=DEFAULT, help="default: %(default)s")
    one.add_argument("--stats", action="store_true", help="with OP-TEE's statistics: see xtest --stats")
    one.add_argument("--memory", type=int, default=2048, metavar="MIB", help="default: %(default)s")
    one.add_argument("--shell", action="store_true", help="its console is this terminal, with a shell")
    one.add_argument(
        "--guest",
        action="store_true",
        help="start `virtio-tee serve` in it and a guest VM on that, and run the command there",
    )
    one.add_argument("--tee", default="soft", help="what that serves (default: %(default)s)")
    one.add_argument("run", nargs="*", help="a command to run in it, after `--`")
    text = "run OP-TEE's test suite natively, and in a guest VM through virtio-tee, and compare"
    one = sub.add_parser("xtest", help=text, description=text, epilog=EPILOG)
    one.add_argument("--stack", choices=STACKS, default=DEFAULT, help="default: %(default)s")
    one.add_argument("--stats", action="store_true", help="with OP-TEE's statistics")
    one.add_argument("cases", nargs="*", default=SMOKE, help=f"default: {' '.join(SMOKE)}")
    return parser


def _build(chosen: list[Stack]) -> int:
    found = {}
    for stack in chosen:
        firmware = ensure_firmware(stack)
        images = {"host VM": host_image(stack), "guest VM": guest_image(stack)}
        kernels = {f"Linux of the {name}": image.kernel_release for name, image in images.items()}
        found[stack.name] = {"bios": str(firmware.bios), **firmware.versions, **kernels}
    print(json.dumps(found, indent=1))
    return 0


def _boot(args: argparse.Namespace, stack: Stack) -> int:
    if args.shell:
        return boot_host_for_person(stack, args.memory)
    with OpteeHost(stack, memory_mib=args.memory) as host:
        say(f"the host VM is up after {host.boot_seconds:.1f} s")
        if not args.guest:
            return _run(host, args.run)
        with host.served("/run/tee.sock", "--tee", args.tee), host.guest(["/run/tee.sock"]) as guest:
            say(f"the guest VM is up after {guest.boot_seconds:.1f} s")
            return _run(guest, args.run)


def _run(where: DrivenGuest, command: list[str]) -> int:
    if not command:
        return 0
    done = where.run(command, check=False, timeout=3600)
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    return done.returncode


def _command(args: argparse.Namespace) -> int:
    began = time.monotonic()
    chosen = list(STACKS.values()) if args.stack == "all" else [STACKS[args.stack]]
    if args.stats:
        chosen = [with_stats(stack) for stack in chosen]
    if args.command == "xtest":
        found = compare(chosen[0], args.cases)
        print(found)
        code = 0 if found.is_good else 1
    else:
        code = _build(chosen) if args.command == "build" else _boot(args, chosen[0])
    say(f"done in {time.monotonic() - began:.1f} s")
    return code


def main() -> int:
    try:
        return _command(_parser().parse_args())
    except (LabError, GuestError) as error:
        print(f"lab: {error}", file=sys.stderr)
        return 2 if isinstance(error, LabError) and "sudo apt-get" in str(error) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
