"""One daemon thread per process for all that must not wait in the user's threads.

It holds no lock while it sleeps and is never joined, so it cannot hold up an exit. A forked child has none: there, partial
text goes out at flush, at exit and with its line's end.
"""

from __future__ import annotations

import heapq
import itertools
import os
import threading
import time
from collections.abc import Callable

from skyrl_otel.capture import guard

#: Does one piece of work and returns in how many seconds it wants to be called again, or None for never.
Task = Callable[[], "float | None"]


class Watch:
    """Runs tasks one after the other. Started by the first `add`."""

    def __init__(self) -> None:
        self._wake = threading.Event()
        self._lock = threading.Lock()  # protects _due and _thread
        self._due: list[tuple[float, int, str, Task]] = []
        self._order = itertools.count()
        self._stopped = False
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()

    def add(self, name: str, task: Task, delay_s: float = 0.0) -> None:
        """Call `task` after `delay_s`. In a forked child: does nothing."""
        if self._pid != os.getpid():
            return
        with self._lock:
            heapq.heappush(self._due, (time.monotonic() + delay_s, next(self._order), name, task))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="skyrl-otel", daemon=True)
                self._thread.start()
        self._wake.set()

    def stop(self) -> None:
        """Let the thread end by itself soon; nobody waits for it."""
        self._stopped = True
        self._wake.set()

    def _run(self) -> None:
        while not self._stopped:
            self._wake.clear()
            with self._lock:
                wait_s = self._due[0][0] - time.monotonic() if self._due else 3600.0
                entry = heapq.heappop(self._due) if wait_s <= 0 else None
            if entry is None:
                self._wake.wait(wait_s)
                continue
            _, _, name, task = entry
            again: float | None = 5.0  # a task that failed is tried again, slowly
            with guard.guarded(f"watch.{name}"):
                again = task()
            if again is not None:
                with self._lock:
                    heapq.heappush(self._due, (time.monotonic() + again, next(self._order), name, task))
