"""A write to a captured fd, with the agent reading and punching behind it, next to a write to a plain file.

Both happen in one process, in alternated rounds, on the same disk. Also a print through our stream next to one through the
stream that Ray puts in its workers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# Takes everything and says yes, in a process of its own.
RECEIVER = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


def run(quick: bool) -> dict[str, object]:
    """Measure in a child process; `quick` takes fewer rounds."""
    with tempfile.TemporaryDirectory(prefix="sk-fd-", dir="/var/tmp", ignore_cleanup_errors=True) as root:
        receiver = subprocess.Popen([sys.executable, "-c", RECEIVER], stdout=subprocess.PIPE, text=True)
        try:
            assert receiver.stdout is not None
            env = {
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "SKYRL_OTEL_RUN_ID": "bench",
                "SKYRL_OTEL_SPOOL_DIR": root,
                "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.stdout.readline().strip()}",
            }
            os.chmod(root, 0o700)
            command = [sys.executable, "-m", "benchmarks.fd", "10" if quick else "60", root]
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
            result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
            return result
        finally:
            receiver.kill()
            receiver.wait()


def child(rounds: int, root: Path) -> dict[str, object]:
    """What the child measures. Its fds 1 and 2 are captured meanwhile."""
    import ray._private.utils as ray_utils

    from skyrl_otel import attach, detach
    from skyrl_otel.capture import runtime

    attach(channel="infra")
    running = runtime.current()
    assert running is not None and running.folder is not None, "capture did not start"
    folder, run_dir = running.folder.path, running.run
    plain = os.open(root / "plain", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    _wait_for(lambda: run_dir.status.exists(), "the agent did not start")

    line = b"(EngineCore pid=1234) INFO 11-21 12:00:00 [core.py:77] a line of a usual length, as vLLM writes it 0123456789\n"
    text = line.decode().rstrip("\n")
    rays = ray_utils.open_log(plain, unbuffered=True, closefd=False)
    ours = sys.stdout

    def write(descriptor: int) -> None:
        for _ in range(1000):
            os.write(descriptor, line)

    def printed(stream: Any) -> None:
        for _ in range(1000):
            print(text, file=stream)

    kinds: dict[str, Callable[[], None]] = {
        "plain_write": lambda: write(plain),
        "captured_write": lambda: write(1),
        "ray_print": lambda: printed(rays),
        "captured_print": lambda: printed(ours),
    }
    for work in kinds.values():
        work()
    took: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds):
        order = list(kinds) if number % 2 else list(reversed(kinds))
        for kind in order:
            began = time.perf_counter()
            kinds[kind]()
            took[kind].append((time.perf_counter() - began) * 1000)  # µs a call
        os.ftruncate(plain, 0)
    out = folder / "out"
    _wait_for(lambda: _punched(out), "the agent did not punch")
    found = os.stat(out)
    detach()
    os.close(plain)
    us = {kind: median(values) for kind, values in took.items()}
    return {
        "ratio_to_plain_redirect": round(us["captured_write"] / us["plain_write"], 3),
        "ratio_of_print_to_rays": round(us["captured_print"] / us["ray_print"], 3),
        **{f"{kind}_us": round(value, 2) for kind, value in us.items()},
        "captured_bytes": found.st_size,
        "punched_bytes": max(0, found.st_size - found.st_blocks * 512),
        "calls_a_round": 1000,
        "rounds": rounds,
    }


def _punched(path: Path) -> bool:
    found = os.stat(path)
    return found.st_blocks * 512 < found.st_size // 2


def _wait_for(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(otherwise)
        time.sleep(0.05)


if __name__ == "__main__":
    print(json.dumps(child(int(sys.argv[1]), Path(sys.argv[2]))))
