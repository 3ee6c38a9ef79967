"""Threads that log, forks between them, SIGKILL at a random moment: what is delivered, next to what had returned.

The tests are in `test_kill_rounds.py`; `python -m tests.agent.kill_rounds 50` runs as many rounds and prints one line each.
"""

from __future__ import annotations

import http.server
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from skyrl_otel.capture import launch
from skyrl_otel.spool import layout, token
from skyrl_otel.spool.token import Shipping

ROOT = Path(__file__).resolve().parents[2]
THREADS, FORKS, THREADS_OF_CHILD = 8, 20, 4
SLOTS = THREADS + FORKS * THREADS_OF_CHILD
OF_CHILD = 200  # records of each of its threads
OF_CHILDREN = FORKS * THREADS_OF_CHILD * OF_CHILD

# Slot n of the shared map counts the calls of writer n that have returned.
LOGGER = """
import mmap, os, struct, sys, threading, time, logging
import skyrl_otel
records, path = int(sys.argv[1]), sys.argv[2]
shared = mmap.mmap(os.open(path, os.O_RDWR), 0)
skyrl_otel.attach(role="policy", channel="infra")
log = logging.getLogger("kill"); log.setLevel(20); log.propagate = False; log.addHandler(logging.NullHandler())
def work(slot, count):
    put = struct.pack_into
    for number in range(count):
        log.info("slot %02d number %06d;", slot, number)
        put("<Q", shared, slot * 8, number + 1)
threads = [threading.Thread(target=work, args=(slot, records)) for slot in range(THREADS)]
for thread in threads: thread.start()
def child(first):
    together = threading.Barrier(THREADS_OF_CHILD)
    def begin(slot):
        together.wait()  # all of them find that the child has no place yet
        work(slot, OF_CHILD)
    threads = [threading.Thread(target=begin, args=(first + number,)) for number in range(THREADS_OF_CHILD)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
slot = THREADS
while slot < SLOTS or any(thread.is_alive() for thread in threads):
    if slot < SLOTS:
        pid = os.fork()
        if pid == 0:
            child(slot)
            os._exit(0)
        slot += THREADS_OF_CHILD
    time.sleep(0.02)
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        pass
for thread in threads: thread.join()
try:
    while True: os.wait()
except ChildProcessError:
    pass
"""
for _name in ("THREADS_OF_CHILD", "OF_CHILD", "THREADS", "SLOTS"):
    LOGGER = re.sub(rf"\b{_name}\b", str(globals()[_name]), LOGGER)

# As a record's body: the end event has the last line too, as an attribute.
_RECORD = re.compile(rb"\x2a\x18\x0a\x16slot (\d\d) number (\d{6});")


class Bodies:
    """Answers 200 and keeps what it was sent, as bytes."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int]] = []
        self.losses = 0
        bodies = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                bodies.found += [(int(slot), int(number)) for slot, number in _RECORD.findall(body)]
                bodies.losses += body.count(b"skyrl.lost.bytes")
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1/logs"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def one_round(records: int, killed_at: float) -> dict[str, int]:
    """One program's life. Raises AssertionError where a record that had returned is missing, repeated or out of order.

    Args:
        records: what each of its own threads says.
        killed_at: the part of all records at which it is killed; from 1.0 on it comes to its end.
    """
    with tempfile.TemporaryDirectory(prefix="sk-kill-", dir="/var/tmp", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        (root / "shared").write_bytes(bytes(SLOTS * 8))
        bodies = Bodies()
        run = layout.open_run(root / "spool", "run")
        token.write(run, Shipping(bodies.url, {}))
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "SKYRL_OTEL_RUN_ID": "run",
            "SKYRL_OTEL_SPOOL_DIR": str(root / "spool"),
            "OTEL_EXPORTER_OTLP_ENDPOINT": bodies.url.removesuffix("/v1/logs"),
            "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
        }
        command = [sys.executable, "-c", LOGGER, str(records), str(root / "shared")]
        program = subprocess.Popen(command, env=env, start_new_session=True)
        _await(program, root / "shared", killed_at * (THREADS * records + OF_CHILDREN))
        try:
            os.killpg(program.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        program.wait()
        returned = _returned(root / "shared")
        wanted = sum(returned)
        deadline = time.monotonic() + 120
        launch.ensure_agent(run)  # where the program died before its watch thread did
        while list(run.writers()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not list(run.writers()), f"not delivered in time: {len(bodies.found)} of {wanted}"
        bodies.close()
        _check(bodies.found, returned)
        return {
            "returned": wanted,
            "delivered": len(bodies.found),
            "writers": sum(map(bool, returned)),
            "torn": bodies.losses,
        }


def _returned(path: Path) -> tuple[int, ...]:
    return struct.unpack(f"<{SLOTS}Q", path.read_bytes())


def _await(program: subprocess.Popen[bytes], path: Path, count: float) -> None:
    """Until so many calls have returned, or the program has ended."""
    while program.poll() is None and sum(_returned(path)) < count:
        time.sleep(random.uniform(0.001, 0.02))


def _check(found: list[tuple[int, int]], returned: tuple[int, ...]) -> None:
    by_slot: dict[int, list[int]] = {}
    for slot, number in found:
        by_slot.setdefault(slot, []).append(number)
    for slot, count in enumerate(returned):
        numbers = by_slot.get(slot, [])
        assert numbers == list(range(len(numbers))), f"slot {slot}: {_wrong(numbers)}"
        assert count <= len(numbers) <= count + 1, f"slot {slot}: {count} returned, {len(numbers)} delivered"


def _wrong(numbers: list[int]) -> str:
    """What is wrong with a sequence that should be 0, 1, 2, …"""
    missing = sorted(set(range(max(numbers) + 1)) - set(numbers))
    first = next(place for place, number in enumerate(numbers) if place != number)
    repeated = len(numbers) - len(set(numbers))
    return f"{repeated} repeated, {len(missing)} missing ({missing[:5]}), first at {first}: {numbers[first - 2 : first + 6]}"


def main() -> None:
    rounds = int(sys.argv[1])
    began = time.monotonic()
    total = 0
    for number in range(rounds):
        result = one_round(100_000, random.uniform(0.0, 1.5))
        total += result["returned"]
        print(number, result, flush=True)
    print(
        f"{rounds} rounds, {total} records whose call had returned, each delivered once; {time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
