"""The agent's parent: holds the node's lock, restarts a working child, does nothing else that could fail.

Parent and child share the lock's description and a socket pair. Whichever dies, the other sees end of file on its end: the
parent forks a new child, the child starts a new parent and goes on with what it was doing. If both die at once, a
writer's watch thread starts a new agent (`capture/launch.py`).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path

from skyrl_otel.agent import worker
from skyrl_otel.spool import locks
from skyrl_otel.spool.layout import RunDir

_FIRST_PAUSE_S, _LAST_PAUSE_S, _STABLE_S = 0.05, 2.0, 2.0


def main(arguments: list[str]) -> None:
    """``RUN_PATH`` elects itself; ``RUN_PATH LOCK_FD SOCKET_FD CHILD_PID`` takes over from a parent that died."""
    run = RunDir(Path(arguments[0]), Path(arguments[0]).name)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if len(arguments) == 4:
        lock, inherited, child = (int(text) for text in arguments[1:])
        _Supervisor(run, lock).adopt(socket.socket(fileno=inherited), child)
        return
    lock_or_none = _elect(run)
    if lock_or_none is not None:
        _Supervisor(run, lock_or_none).run()


def _elect(run: RunDir) -> int | None:
    # A writer that asks who holds the lock has it shared for a moment, so one refusal proves nothing.
    for _ in range(20):
        try:
            lock = locks.take(run.agent_lock)
        except FileNotFoundError:
            return None
        if lock is not None:
            return lock
        time.sleep(0.05)
    return None


class _Supervisor:
    def __init__(self, run: RunDir, lock: int) -> None:
        self._run = run
        self._lock = lock
        self._restarts = 0
        self._terminated = False
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGTERM, self._on_term)

    def _on_term(self, *_: object) -> None:
        self._terminated = True
        with contextlib.suppress(OSError):
            os.write(self._wake_w, b"t")

    def adopt(self, link: socket.socket, child: int) -> None:
        os.set_inheritable(link.fileno(), False)
        os.set_inheritable(self._lock, False)
        if not self._watch(link, child):
            self.run()

    def run(self) -> None:
        """Keep a child working until one says it is done."""
        pause_s = _FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            link, child = self._fork()
            if self._watch(link, child):
                return
            pause_s = _FIRST_PAUSE_S if time.monotonic() - began > _STABLE_S else min(pause_s * 2, _LAST_PAUSE_S)
            time.sleep(pause_s)
            if self._terminated:
                return
            self._restarts += 1

    def _fork(self) -> tuple[socket.socket, int]:
        mine, theirs = socket.socketpair()
        # A SIGTERM that came while the child still has our handler would be heard by nobody.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        child = os.fork()
        if child:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
            theirs.close()
            return mine, child
        code = 1
        try:
            mine.close()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
            worker.main(self._run, self._lock, theirs, self._restarts)
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)

    def _watch(self, link: socket.socket, child: int) -> bool:
        """Wait for the child's end; True if it was done or we are to end."""
        done = False
        while True:
            ready, _, _ = select.select([link.fileno(), self._wake_r], [], [])
            if self._wake_r in ready:
                os.read(self._wake_r, 16)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGTERM)
            if link.fileno() in ready:
                try:
                    said = link.recv(16)
                except ConnectionError:
                    said = b""
                if said:
                    done = True
                    continue
                break
        link.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)
        return done or self._terminated
