"""`python -m lab.qemu`: QEMU with the vhost-user-tee device, and guests for it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from lab import clients
from lab.arch import ARCHS, X86_64, Arch
from lab.cache import LabError, say
from lab.qemu import module
from lab.qemu.build import TARGETS, ensure_qemu
from lab.qemu.command import GuestConfig, default_accel
from lab.qemu.guest import Guest, GuestError, boot_for_person
from lab.qemu.image import MODULES, GuestImage, ensure_image
from lab.qemu.qtest import run_qtests
from lab.qemu.source import checkpatch
from lab.tas import TA_FOLDER, ta_files

EPILOG = """\
To see a guest with the device, type in one terminal

  virtio-tee serve --socket-path /tmp/tee.sock --ta-key vendor.pem

and in another

  python -m lab.qemu boot --socket /tmp/tee.sock --ta-folder tas --shell

and there, in the guest, `virtio-tee guest --help`.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lab.qemu",
        description="QEMU with the vhost-user-tee device, and Debian guests for it. Everything is kept in"
        " ${VIRTIO_TEE_CACHE:-~/.cache/virtio-tee}.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("build", "build QEMU from Debian's source package with our patches (3 to 5 minutes, then cached)"),
        ("qtest", "run QEMU's own tests of the device; builds QEMU if need be"),
    ):
        one = sub.add_parser(name, help=text, description=text)
        one.add_argument("--target", choices=TARGETS, default=TARGETS[0], help="default: %(default)s")
    text = "run QEMU's scripts/checkpatch.pl on the patches"
    sub.add_parser("checkpatch", help=text, description=text)
    text = "build the guest's kernel and initramfs"
    one = sub.add_parser("image", help=text, description=text)
    _add_arch(one)
    one.add_argument("--module", action="append", default=[], help=f"one more than {', '.join(MODULES)}")
    text = "build the kernel driver for the guest's kernel, and run the kernel's checkpatch.pl on it"
    _add_arch(sub.add_parser("module", help=text, description=text))
    text = "boot a guest; without --shell, until its agent answers, then say how long it took"
    one = sub.add_parser("boot", help=text, description=text, epilog=EPILOG)
    one.formatter_class = argparse.RawDescriptionHelpFormatter
    _add_arch(one)
    one.add_argument(
        "--socket", action="append", default=[], help="a backend's socket: one device each; may be repeated"
    )
    one.add_argument("--kvm", action="store_true", help="use the CPU instead of emulating one")
    one.add_argument("--shell", action="store_true", help="the guest's console is this terminal, with a shell")
    one.add_argument("--queues", type=int, default=1, help="request queues of each device (default: 1)")
    one.add_argument("--memory", type=int, default=384, metavar="MIB", help="default: %(default)s")
    one.add_argument(
        "--kernel-driver",
        action="store_true",
        help="the guest's kernel drives the device: /dev/tee0 and /dev/teepriv0. With --arch aarch64 the guest also has"
        " Debian's libteec and tee-supplicant, and tee-examples (without arguments it says what it can do)",
    )
    one.add_argument(
        "--ta-folder", type=Path, metavar="DIR", help=f"put the TAs (*.ta) of this folder into the guest's {TA_FOLDER}"
    )
    one.add_argument("run", nargs="*", help="a command to run in the guest, after `--`")
    return parser


def _add_arch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch", choices=sorted(ARCHS), default=X86_64.name, help="the guest's architecture (default: %(default)s)"
    )


def _boot(args: argparse.Namespace) -> int:
    arch = ARCHS[args.arch]
    config = GuestConfig(
        sockets=args.socket,
        arch=arch,
        memory_mib=args.memory,
        num_request_queues=args.queues,
        accel="kvm" if args.kvm else default_accel(),
        uio=not args.kernel_driver,
    )
    tas = ta_files(args.ta_folder)
    image = _driving_image(tas, arch) if args.kernel_driver else ensure_image(extra=tas, arch=arch)
    if args.shell:
        return boot_for_person(config, image)
    with Guest(config, image=image) as guest:
        say(f"the guest is up after {guest.boot_seconds:.1f} s")
        if not args.run:
            print(guest.console, end="")
            return 0
        done = guest.run(args.run, check=False, timeout=600)
        sys.stdout.write(done.stdout)
        sys.stderr.write(done.stderr)
        return done.returncode


def _driving_image(tas: list[tuple[str, Path]], arch: Arch) -> GuestImage:
    """Whose kernel drives the device."""
    wanted = (*MODULES, "tee")
    built = module.ensure_module(ensure_image(wanted, arch=arch))
    return ensure_image(wanted, [*tas, *clients.for_guest(arch)], arch, [built])


def _command(args: argparse.Namespace) -> int:
    began = time.monotonic()
    if args.command == "build":
        qemu = ensure_qemu(args.target)
        paths = {"binary": str(qemu.binary), "firmware_dir": str(qemu.firmware_dir), "version": qemu.version}
        print(json.dumps(paths, indent=1))
    elif args.command == "qtest":
        count = run_qtests(ensure_qemu(args.target))
        print(f"{count} tests passed")
    elif args.command == "checkpatch":
        print(checkpatch(), end="")
    elif args.command == "image":
        image = ensure_image((*MODULES, *args.module), arch=ARCHS[args.arch])
        print(json.dumps({"kernel": str(image.kernel), "initrds": [str(p) for p in image.initrds]}, indent=1))
    elif args.command == "module":
        print(module.checkpatch(), end="")
        print(module.ensure_module(ensure_image((*MODULES, "tee"), arch=ARCHS[args.arch])))
    else:
        return _boot(args)
    say(f"done in {time.monotonic() - began:.1f} s")
    return 0


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
