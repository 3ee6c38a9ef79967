"""A launcher in a subprocess, with or without a terminal of its own, and what it put into the spool."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from skyrl_otel.spool import locks
from skyrl_otel.spool.layout import open_run

LAUNCHER = (sys.executable, "-c", "import sys; from skyrl_otel.terminal.run import main; sys.exit(main(sys.argv[1:]))")
RUN = "run-under-test"
DEADLINE_S = 30.0


def python(code: str) -> list[str]:
    """A command that runs `code`."""
    return [sys.executable, "-c", code]


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = DEADLINE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.01)


class Terminal:
    """A process with a terminal as its controlling terminal, stdin, stdout and stderr; we sit at the other end."""

    def __init__(self, command: list[str], env: dict[str, str], cwd: Path, rows: int = 24, columns: int = 80) -> None:
        self.output = b""
        self._status: int | None = None
        self.pid, self._master = pty.fork()
        if self.pid == 0:
            try:
                os.chdir(cwd)
                fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
                os.execvpe(command[0], command, env)
            finally:
                os._exit(99)

    def send(self, data: bytes) -> None:
        os.write(self._master, data)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read_until(self, text: bytes, timeout_s: float = DEADLINE_S, start: int = 0) -> bytes:
        """Read until `text` stands at or behind `start` of all output so far; that output."""
        deadline = time.monotonic() + timeout_s
        while text not in self.output[start:]:
            assert time.monotonic() < deadline, f"waited {timeout_s} s for {text!r} in {self.output!r}"
            assert self._read(0.1), f"ended without {text!r}: {self.output!r}"
        return self.output

    def finish(self, timeout_s: float = DEADLINE_S) -> int:
        """Read to the end; the wait status."""
        deadline = time.monotonic() + timeout_s
        while self._read(0.1):
            assert time.monotonic() < deadline, f"still runs after {timeout_s} s: {self.output!r}"
        if self._status is None:
            self._status = os.waitpid(self.pid, 0)[1]
        return self._status

    def close(self) -> None:
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._master)

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self._master], [], [], timeout_s)[0]:
            return True
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # EIO: nobody has the other end open any more
            return False
        self.output += data
        return bool(data)


class Launcher:
    """Starts `skyrl-otel run -- CMD`. No agent runs beside it, so the spool keeps all that was recorded; and no collector
    unless `with_collector` is called."""

    def __init__(self, root: Path, cwd: Path) -> None:
        self.cwd = cwd
        self.root = root
        self.run_dir = open_run(root, RUN)
        self._agent_lock = locks.take(self.run_dir.agent_lock)
        self._launcher_lock = locks.take(self.run_dir.launcher_lock)
        self.env = {
            **os.environ,
            "SKYRL_OTEL_SPOOL_DIR": str(root),
            "SKYRL_OTEL_RUN_ID": RUN,
            "SKYRL_OTEL_DRAIN_S": "0",
            "SKYRL_OTEL_NODE_IP": "127.0.0.1",
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
            "TERM": "xterm-256color",
        }
        self._terminals: list[Terminal] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    def with_collector(self) -> None:
        del self.env["OTEL_EXPORTER_OTLP_ENDPOINT"]
        self._release("_launcher_lock")

    def start(self, *command: str, prefix: tuple[str, ...] = (), **options: object) -> subprocess.Popen[bytes]:
        """The launcher as a plain process; stdout and stderr are pipes unless `options` say otherwise."""
        settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
        process = subprocess.Popen([*prefix, *LAUNCHER, *command], env=self.env, cwd=self.cwd, **settings)  # type: ignore[call-overload]
        self._processes.append(process)
        return process

    def __call__(self, *command: str, **options: object) -> subprocess.CompletedProcess[bytes]:
        process = self.start(*command, **options)
        out, err = process.communicate(timeout=DEADLINE_S)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def terminal(self, *command: str, bare: bool = False, **options: int) -> Terminal:
        """The launcher, or the bare command, in a terminal."""
        terminal = Terminal([*(() if bare else LAUNCHER), *command], self.env, self.cwd, **options)
        self._terminals.append(terminal)
        return terminal

    def recorded(self, name: str = "out") -> bytes:
        """All bytes of that stream in the spool."""
        return b"".join(
            (folder / name).read_bytes() for _, folder in self.run_dir.writers() if (folder / name).exists()
        )

    def close(self) -> None:
        for terminal in self._terminals:
            terminal.close()
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.communicate()
        self._release("_agent_lock")
        self._release("_launcher_lock")

    def _release(self, lock: str) -> None:
        if (descriptor := getattr(self, lock)) is not None:
            os.close(descriptor)
            setattr(self, lock, None)


@pytest.fixture
def launch(spool_root: Path, tmp_path: Path) -> Iterator[Launcher]:
    launcher = Launcher(spool_root, tmp_path)
    yield launcher
    launcher.close()
