"""The embedded collector's process during a run: started beside the child, restarted when it dies, ended at the end.

It lies in a session of its own, so Ctrl-C and a closed terminal do not reach it. The child never waits for it: until it is
ready, agents read on and do not send.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from skyrl_otel.config import Config
from skyrl_otel.spool import locks, token
from skyrl_otel.spool.layout import RunDir, ensure_private_dir, open_file, read_file

_LOOK_EVERY_S = 0.02
_GIVE_UP_AFTER = 5
_ELECTION_TRIES = 5
_FIRST_PAUSE_S, _LAST_PAUSE_S, _STABLE_S = 0.1, 2.0, 5.0
# `-m` would put the user's working folder, and whatever modules lie there, in front of everything.
_BOOT = (
    "import sys; sys.path[:1] = []; import runpy; "
    "runpy.run_module('skyrl_otel.collector', run_name='__main__', alter_sys=True)"
)


@dataclass(frozen=True, slots=True)
class Ready:
    """A collector that listens: `url` is its root, `secret` the bearer token; the paths are "" with --control-only."""

    url: str
    pid: int
    log_dir: str
    infra: str
    progress: str
    secret: str

    @property
    def authorization(self) -> str:
        return f"Bearer {self.secret}"


def hand_out_token(run: RunDir, config: Config, ready: Ready) -> None:
    """Tell this node's agent, and whoever passes it on to other nodes, where to send and report. Raises OSError."""
    control = token.Control(f"{ready.url}/v1/status", ready.authorization)
    shipping = token.from_config(config, control) or token.Shipping(
        f"{ready.url}/v1/logs", {"authorization": ready.authorization}, control=control, redact=token.redaction(config)
    )
    token.write(run, shipping)


class Collector(threading.Thread):
    """Keeps one collector alive for the run, or uses the one that another launcher of the same run keeps alive.

    Args:
        host: finds the address to listen on; asked in the thread, for it may have to resolve a name.
        control_only: no store; only agents' status reports.
        keeper: the command that started this process, where it is there for nothing else. The collector calls it if this
            process is killed, and its successor goes on with that collector. Such a keeper gives way to any other.
        mask: the signal mask the process starts with.
        on_ready: called each time one listens.
        on_failure: called once, with one sentence, when none can be started.
    """

    def __init__(
        self,
        run: RunDir,
        log_dir: Path,
        host: Callable[[], str],
        *,
        control_only: bool,
        keeper: Sequence[str] = (),
        mask: Iterable[int],
        on_ready: Callable[[Ready], None],
        on_failure: Callable[[str], None],
    ) -> None:
        super().__init__(name="skyrl-otel-collector", daemon=True)
        self.ready: Ready | None = None
        self.remarks: list[str] = []
        self.restarts = 0
        self._run_dir = run
        self._log_dir = log_dir
        self._host = host
        self._control_only = control_only
        self._keeper = tuple(keeper)
        self._mask = tuple(mask)
        self._on_ready = on_ready
        self._on_failure = on_failure
        self._stopping = threading.Event()
        self._settled = threading.Event()
        self._pid = 0
        self._starting = threading.Lock()  # no process is started once `stop` has been called

    def run(self) -> None:
        try:
            lock = self._become_owner()
            if lock is not None:
                self._keep_alive()
                os.close(lock)
        except Exception as error:
            self._on_failure(f"the collector could not be started: {error}")
        finally:
            self._settled.set()

    def wait_ready(self, timeout_s: float, is_skipped: Callable[[], bool]) -> Ready | None:
        """The collector that listens; None where none does by then, or none can be started."""
        deadline = time.monotonic() + timeout_s
        while self.ready is None and not self._settled.is_set() and not is_skipped() and time.monotonic() < deadline:
            self._settled.wait(_LOOK_EVERY_S)
        return self.ready

    def stop(self) -> None:
        """Ask it to end: it commits, copies the store and goes. Use `join` to wait for that."""
        with self._starting:
            self._stopping.set()
            if self._pid:
                _kill(self._pid)

    def _become_owner(self) -> int | None:
        """The run's launcher lock; None if the run ended while somebody else had it, or it is left to them."""
        for tries in itertools.count(1):
            lock = locks.take(self._run_dir.launcher_lock)
            # Who asks whether it is held has it shared for a moment, so one refusal proves nothing.
            if lock is not None or (self._keeper and tries == _ELECTION_TRIES):
                return lock
            if self.ready is None:
                self._look()
            if self._stopping.wait(0.2):
                break
        return None

    def _keep_alive(self) -> None:
        ensure_private_dir(self._run_dir.store)
        pause_s = _FIRST_PAUSE_S
        failures = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            if locks.is_held(self._run_dir.store / "lock"):
                self._use_what_was_left_behind()
                if self._keeper and self._run_dir.copy_note.exists():
                    return  # it ended in order: it found nobody left to serve
                continue
            if not self._start():
                return
            came_up, status = self._watch()
            if self._stopping.is_set() or (came_up and os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0):
                return  # told to, or it found nobody left to serve
            failures = 0 if came_up else failures + 1
            # A code is its own verdict that it cannot run here; a signal is somebody else's doing, for a while.
            if self.ready is None and (os.WIFEXITED(status) or failures == _GIVE_UP_AFTER):
                self._on_failure(self._last_words())
                return
            self.restarts += 1
            pause_s = _FIRST_PAUSE_S if time.monotonic() - began > _STABLE_S else min(pause_s * 2, _LAST_PAUSE_S)
            self._stopping.wait(pause_s)

    def _use_what_was_left_behind(self) -> None:
        """The collector of a launcher of this run that was killed serves as well, and is ours to end."""
        while locks.is_held(self._run_dir.store / "lock"):
            if self.ready is None:
                self._look()
            if self._stopping.wait(0.2) and self.ready is not None:
                _kill(self.ready.pid)

    def _start(self) -> bool:
        port = urlsplit(self.ready.url).port or 0 if self.ready else 0
        arguments = [sys.executable, "-c", _BOOT, "--run-dir", str(self._run_dir.path), "--log-dir", str(self._log_dir)]
        arguments += ["--host", self._host(), "--port", str(port)] + ["--control-only"] * self._control_only
        # For the day on which nobody is left to end it.
        arguments += ["--exit-when-drained"]
        if self._keeper:
            arguments += ["--keeper", json.dumps(self._keeper)]
        log = open_file(self._log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, log, 1),
            (os.POSIX_SPAWN_DUP2, log, 2),
        ]
        # Descriptors that the user lets their command inherit (a lock, a job server) are not for this process.
        actions += [(os.POSIX_SPAWN_CLOSE, fd) for fd in _inheritable()]
        try:
            with self._starting:
                if self._stopping.is_set():
                    return False
                self._pid = os.posix_spawn(
                    sys.executable,
                    arguments,
                    os.environ,
                    file_actions=actions,
                    setsid=True,
                    setsigmask=self._mask,
                    setsigdef=(signal.SIGPIPE, signal.SIGINT, signal.SIGHUP),
                )
        finally:
            os.close(log)
        return True

    def _watch(self) -> tuple[bool, int]:
        """Wait for the process's end: whether it had been ready, and its wait status."""
        came_up = False
        while True:
            try:
                ended, status = os.waitpid(self._pid, 0 if came_up else os.WNOHANG)
            except ChildProcessError:  # as PID 1 we reap all there is, in another thread
                ended, status = self._pid, 0
            came_up = came_up or self._look(self._pid)
            if not ended:
                time.sleep(_LOOK_EVERY_S)
                continue
            if status and came_up and self._stopping.is_set():
                self.remarks.append(self._last_words())
            with self._starting:
                self._pid = 0
            return came_up, status

    def _look(self, pid: int | None = None) -> bool:
        """Read the ready file; whether it is there and, if `pid` is given, that process's."""
        try:
            said = json.loads(read_file(self._run_dir.store / "ready"))
            secret = read_file(self._run_dir.store / "secret").decode().strip()
            ready = Ready(
                url=said["url"].rstrip("/").removesuffix("/v1/logs"),
                pid=said["pid"],
                log_dir=said.get("log_dir") or "",
                infra=said.get("infra") or "",
                progress=said.get("progress") or "",
                secret=secret,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        if pid is not None and ready.pid != pid:
            return False
        self.ready = ready
        self._on_ready(ready)
        return True

    def _last_words(self) -> str:
        try:
            lines = read_file(self._log_file).decode(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1].removeprefix("skyrl-otel ") if lines else "the collector ended without a word"

    @property
    def _log_file(self) -> Path:
        return self._run_dir.store / "collector.log"


def _inheritable() -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if int(name) > 2 and os.get_inheritable(int(name)):
                found.append(int(name))
        except OSError:
            continue
    return found


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        pass
