"""Settings for all tests."""

from __future__ import annotations

import os

from hypothesis import settings

# A slow or busy machine is no failure. In CI the same examples are tried each time: what they are is chosen by the
# tests' code, and new ones are looked for on developers' machines.
settings.register_profile("here", deadline=None, print_blob=True)
settings.register_profile("ci", settings.get_profile("here"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")
