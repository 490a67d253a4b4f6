"""Runs in the guest: does what the host asks for, one JSON object per line over a virtio-serial port,
or the serial line that the command line names.

A request has an `id` and an `op`; its answer has the same `id`, and `error` if it failed. Bytes travel as
base64. Requests are served side by side, so that a long command does not hold up the next one.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tty

PORT_NAME = "virtio-tee.agent"
CHUNK = 1 << 16


def find_port() -> str:
    base = "/sys/class/virtio-ports"
    while True:
        if os.path.isdir(base):
            for port in os.listdir(base):
                with open(f"{base}/{port}/name") as file:
                    if file.read().strip() == PORT_NAME:
                        return f"/dev/{port}"
        time.sleep(0.05)


def enc(data: bytes) -> str:
    return base64.b64encode(data).decode()


def dec(text: object) -> bytes:
    return base64.b64decode(str(text))


class Agent:
    def __init__(self, port: int) -> None:
        self.port = port
        self.writing = threading.Lock()
        self.children: dict[int, tuple[subprocess.Popen[bytes], str]] = {}

    def send(self, message: dict[str, object]) -> None:
        data = json.dumps(message).encode() + b"\n"
        with self.writing:
            view = memoryview(data)
            while view:
                view = view[os.write(self.port, view[:CHUNK]) :]

    def environment(self, request: dict[str, object]) -> dict[str, str]:
        extra = request.get("env") or {}
        assert isinstance(extra, dict)
        return {**os.environ, **{str(k): str(v) for k, v in extra.items()}}

    def op_ping(self, request: dict[str, object]) -> dict[str, object]:
        return {}

    def op_run(self, request: dict[str, object]) -> dict[str, object]:
        argv = request["argv"]
        assert isinstance(argv, list)
        timeout = request.get("timeout")
        assert timeout is None or isinstance(timeout, int | float)
        child = subprocess.Popen(
            [str(a) for a in argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environment(request),
            cwd=str(request.get("cwd") or "/root"),
            start_new_session=True,
        )
        timed_out = False
        try:
            out, err = child.communicate(dec(request.get("stdin", "")), timeout=timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
            os.killpg(child.pid, signal.SIGKILL)
            out, err = child.communicate()
        return {"returncode": child.returncode, "stdout": enc(out), "stderr": enc(err), "timed_out": timed_out}

    def op_spawn(self, request: dict[str, object]) -> dict[str, object]:
        argv = request["argv"]
        assert isinstance(argv, list)
        folder = tempfile.mkdtemp(prefix="spawn-", dir="/run")
        with open(f"{folder}/out", "wb") as out, open(f"{folder}/err", "wb") as err:
            child = subprocess.Popen(
                [str(a) for a in argv],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=self.environment(request),
                cwd=str(request.get("cwd") or "/root"),
                start_new_session=True,
            )
        self.children[child.pid] = (child, folder)
        return {"pid": child.pid}

    def op_poll(self, request: dict[str, object]) -> dict[str, object]:
        child, folder = self.children[int(str(request["pid"]))]
        code = child.poll()
        with open(f"{folder}/out", "rb") as out, open(f"{folder}/err", "rb") as err:
            return {"returncode": code, "stdout": enc(out.read()), "stderr": enc(err.read())}

    def op_kill(self, request: dict[str, object]) -> dict[str, object]:
        child, _ = self.children[int(str(request["pid"]))]
        if child.poll() is None:
            os.killpg(child.pid, int(str(request.get("signal", signal.SIGTERM))))
        return {}

    def op_put(self, request: dict[str, object]) -> dict[str, object]:
        path = str(request["path"])
        os.makedirs(os.path.dirname(path) or "/", exist_ok=True)
        with open(path, "ab" if request.get("append") else "wb") as file:
            file.write(dec(request["data"]))
        if "mode" in request:
            os.chmod(path, int(str(request["mode"])))
        return {}

    def op_get(self, request: dict[str, object]) -> dict[str, object]:
        with open(str(request["path"]), "rb") as file:
            file.seek(int(str(request.get("offset", 0))))
            return {"data": enc(file.read(int(str(request["size"]))))}

    def serve(self, request: dict[str, object]) -> None:
        try:
            operation = getattr(self, f"op_{request['op']}")
            answer = operation(request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        self.send({"id": request.get("id"), **answer})

    def no_host(self) -> None:
        """Nobody has the host's end of the port open."""
        time.sleep(0.05)

    def loop(self) -> None:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        with open("/proc/uptime") as file:
            up = float(file.read().split()[0])
        self.send({"event": "ready", "boot": boot, "uptime": up})
        pending = b""
        while True:
            data = os.read(self.port, CHUNK)
            if not data:
                self.no_host()
                continue
            pending += data
            *lines, pending = pending.split(b"\n")
            for line in lines:
                if line.strip():
                    request = json.loads(line)
                    threading.Thread(target=self.serve, args=(request,), daemon=True).start()


def main() -> int:
    port = os.open(sys.argv[1] if sys.argv[1:] else find_port(), os.O_RDWR | os.O_NOCTTY)
    if os.isatty(port):
        tty.setraw(port)
    Agent(port).loop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
