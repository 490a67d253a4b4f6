"""TAs that a guest finds where its supplicant looks for them."""

from __future__ import annotations

from pathlib import Path

from lab.cache import LabError

TA_FOLDER = "/lib/optee_armtz"


def ta_files(folder: Path | None) -> list[tuple[str, Path]]:
    """Path in the guest, file here.

    :raises LabError: there are none
    """
    if folder is None:
        return []
    found = sorted(folder.glob("*.ta"))
    if not found:
        raise LabError(f"--ta-folder {folder}: there is no .ta file (virtio-tee ta sign makes them)")
    # /lib is a link to /usr/lib in the guest, which a folder of that name would replace
    return [(f"/usr{TA_FOLDER}/{path.name}", path) for path in found]
