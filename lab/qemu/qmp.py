"""QEMU's monitor protocol, as far as the lab needs it."""

from __future__ import annotations

import json
from pathlib import Path

from lab.run import connect


class QmpError(Exception):
    """The monitor refused a command, or is gone."""


class Qmp:
    def __init__(self, path: Path, timeout: float = 30) -> None:
        self._socket = connect(path)
        self._socket.settimeout(timeout)
        self._file = self._socket.makefile("rw", encoding="utf-8")
        self.events: list[dict[str, object]] = []
        self._read()  # the greeting
        self.execute("qmp_capabilities")

    def _read(self) -> dict[str, object]:
        try:
            line = self._file.readline()
        except OSError as error:
            raise QmpError(f"no answer: {error}") from error
        if not line:
            raise QmpError("QEMU closed the monitor")
        message: dict[str, object] = json.loads(line)
        return message

    def execute(self, command: str, **arguments: object) -> object:
        request: dict[str, object] = {"execute": command}
        if arguments:
            request["arguments"] = {key.replace("_", "-"): value for key, value in arguments.items()}
        try:
            self._file.write(json.dumps(request) + "\n")
            self._file.flush()
        except OSError as error:
            raise QmpError(f"{command}: {error}") from error
        while True:
            answer = self._read()
            if "event" in answer:
                self.events.append(answer)
            elif "error" in answer:
                raise QmpError(f"{command}: {answer['error']}")
            else:
                return answer.get("return")

    def close(self) -> None:
        self._file.close()
        self._socket.close()
