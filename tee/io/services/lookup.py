"""Names of hosts to addresses, in bounded time: the system's resolver may take minutes, and cannot be interrupted."""

from __future__ import annotations

import queue
import socket
import threading
from typing import Any

#: How many lookups may be under way; further ones are refused until one has ended.
MAX_LOOKUPS = 8

#: What ``socket.getaddrinfo`` gives for each address.
Info = tuple[Any, ...]


class Lookups:
    """Asks the resolver on threads of its own. Thread-safe."""

    def __init__(self, most: int = MAX_LOOKUPS) -> None:
        self._free = threading.BoundedSemaphore(most)

    def resolve(self, host: str, port: int, family: int, kind: int, seconds: float) -> list[Info]:
        """The addresses of the name ``host``. Raises TimeoutError after ``seconds``, BlockingIOError while too many
        lookups are under way, OSError or UnicodeError where there are none."""
        if not self._free.acquire(blocking=False):
            raise BlockingIOError("too many names are being looked up")
        answers: queue.SimpleQueue[list[Info] | OSError | UnicodeError] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put(list(socket.getaddrinfo(host, port, family, kind)))
            except (OSError, UnicodeError) as error:
                answers.put(error)
            finally:
                self._free.release()

        threading.Thread(target=ask, name="supplicant-lookup", daemon=True).start()
        try:
            answer = answers.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError(f"no answer about {host} in {seconds:.1f} s") from None
        if not isinstance(answer, list):
            raise answer
        return answer
