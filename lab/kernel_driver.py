"""The project's kernel module: where its source is, and how it is built for whatever kernel."""

from lab.rootfs import REPO

NAME = "virtio_tee"
SOURCES = REPO / "guest_driver" / "linux"
WARNINGS = "-Wall -Wextra -Wno-unused-parameter -Wno-sign-compare -Wno-missing-field-initializers -Werror"
