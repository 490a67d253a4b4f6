"""`python -m lab.uml`: Debian's user-mode-linux as the frontend of vhost-user backends."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from lab.cache import LabError, say
from lab.tas import TA_FOLDER, ta_files
from lab.uml.guest import GuestError, UmlConfig, UmlGuest, boot_for_person
from lab.uml.image import KERNEL_DRIVER, MODULES, ensure_image
from lab.uml.modules import OWN, build_module

TEE_ID = 46
EPILOG = """\
To see Linux's own driver use a device written in Python, type in one terminal

  python -m pyvhost.examples.null_block --socket-path /tmp/blk.sock

and in another

  python -m lab.uml boot --device /tmp/blk.sock:2 -- dd if=/dev/vda of=/dev/null bs=1M count=64

2 is the virtio ID of a block device; 4 is that of an entropy device, 46 that of a TEE device. For the latter,

  python -m lab.uml boot --kernel-driver /tmp/tee.sock --ta-folder tas --shell

loads the driver of guest_driver/linux, too: docs/linux-driver.md.
"""


def device(text: str) -> tuple[str, int]:
    """SOCKET:ID"""
    path, _, number = text.rpartition(":")
    if not path or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not SOCKET:ID, such as /tmp/tee.sock:46")
    return path, int(number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lab.uml",
        description="Debian's user-mode-linux as the frontend of vhost-user backends; no root, no KVM. Everything is"
        " kept in ${VIRTIO_TEE_CACHE:-~/.cache/virtio-tee}.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub = parser.add_subparsers(dest="command", required=True)
    text = f"download user-mode-linux, build the modules that it lacks ({', '.join(OWN)}), make the initramfs"
    sub.add_parser("image", help=text, description=text)
    text = "build an out-of-tree module; prints the path of the .ko"
    one = sub.add_parser("module", help=text, description=text)
    one.add_argument("source", type=Path, metavar="FOLDER", help="with a Kbuild or Makefile that says obj-m")
    one.add_argument("name", metavar="NAME", help="of the module, without .ko")
    one.add_argument("--needs", action="append", choices=sorted(OWN), default=[], help="may be repeated")
    text = "boot a guest; without --shell, until its agent answers, then say how long it took"
    one = sub.add_parser("boot", help=text, description=text, epilog=EPILOG)
    one.formatter_class = argparse.RawDescriptionHelpFormatter
    one.add_argument(
        *("--device", "-d"), action="append", type=device, default=[], metavar="SOCKET:ID", help="may be repeated"
    )
    one.add_argument(
        *("--kernel-driver", "-k"),
        action="append",
        default=[],
        metavar="SOCKET",
        help="the socket of `virtio-tee serve`; the guest's kernel drives the device, as /dev/tee0; may be repeated",
    )
    one.add_argument(
        "--ta-folder", type=Path, metavar="DIR", help=f"put the TAs (*.ta) of this folder into the guest's {TA_FOLDER}"
    )
    one.add_argument("--shell", action="store_true", help="the guest's console is this terminal, with a shell")
    one.add_argument("--memory", type=int, default=256, metavar="MIB", help="default: %(default)s")
    one.add_argument("--module", action="append", default=[], help=f"one more than {', '.join(MODULES)}")
    one.add_argument("run", nargs="*", help="a command to run in the guest, after `--`")
    return parser


def _boot(args: argparse.Namespace) -> int:
    driven = [(socket, TEE_ID) for socket in args.kernel_driver]
    config = UmlConfig(devices=[*args.device, *driven], memory_mib=args.memory)
    driver = KERNEL_DRIVER if driven else ()
    image = ensure_image((*MODULES, *args.module, *driver), extra=ta_files(args.ta_folder))
    if args.shell:
        return boot_for_person(config, image)
    with UmlGuest(config, image=image) as guest:
        say(f"the guest is up after {guest.boot_seconds:.1f} s")
        if not args.run:
            print(guest.console, end="")
            return 0
        done = guest.run(args.run, check=False, timeout=600)
        sys.stdout.write(done.stdout)
        sys.stderr.write(done.stderr)
        return done.returncode


def _command(args: argparse.Namespace) -> int:
    began = time.monotonic()
    if args.command == "boot":
        return _boot(args)
    if args.command == "image":
        image = ensure_image((*MODULES, *OWN))
        paths = {"binary": str(image.binary), "initrds": [str(p) for p in image.initrds]}
        print(json.dumps({**paths, "kernel_release": image.kernel_release}, indent=1))
    else:
        print(build_module(args.source, args.name, needs=[OWN[name]() for name in args.needs]).ko)
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
