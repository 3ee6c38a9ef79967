"""Eight actors and their children write 200,000 lines in every way a process can; one more is killed while it writes.

``census.py LEDGER_PORT FACTS_FILE``. Lines are functions of (rank, kind, number), so that a test can count them.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RANKS = 8
LINES = 25_000
THREADS, PRINTED, LOGGED, WRITTEN_BY_C, IDENTICAL = 4, 2500, 2500, 2400, 6250
BINARY, HUGE, PARTIAL, FORKED, APPENDED, BLOCKED, DOOMED = 50, 2, 3, 100, 100, 300, 400
WRITTEN = (
    LINES
    - THREADS * PRINTED
    - LOGGED
    - WRITTEN_BY_C
    - IDENTICAL
    - BINARY
    - HUGE
    - PARTIAL
    - 2 * FORKED
    - APPENDED
    - 2 * (BLOCKED + 1)
)
CLOBBERED_RANK = RANKS - 1


def huge(rank: int, number: int) -> str:
    return f"huge {rank} {number} " + f"{rank}{number}" * 500_000


def binary(rank: int, number: int) -> bytes:
    return b"binary %d \xff\xfe\x80 %d \xc3\xa9" % (rank, number)


def expected_out(rank: int) -> Counter[str]:
    """Every line of an actor's stdout."""
    lines: Counter[str] = Counter()
    lines.update(f"print {rank} {thread} {n}" for thread in range(THREADS) for n in range(PRINTED))
    lines.update(f"os.write {rank} {n}" for n in range(WRITTEN))
    lines.update(f"puts {rank} {n}" for n in range(WRITTEN_BY_C))
    lines.update(f"the same line {n} of every rank" for n in range(IDENTICAL))
    lines.update(huge(rank, n) for n in range(HUGE))
    lines.update(f"fork {rank} {who} {n}" for who in ("parent", "child") for n in range(FORKED))
    return lines


def expected_err(rank: int) -> Counter[str]:
    """Every line of an actor's stderr but those of the block-buffering children and the doomed ones."""
    lines: Counter[str] = Counter()
    lines.update(binary(rank, n).decode("utf-8", "replace") for n in range(BINARY))
    lines.update(f"partial {rank} {n} ... done" for n in range(PARTIAL))
    lines.update(f"append {rank} {n}" for n in range(APPENDED))
    return lines


def expected_records(rank: int) -> Counter[str]:
    """What an actor says by `logging`, through a console handler too: records, whose echo is no line."""
    return Counter(f"INFO:census:logged {rank} {n}" for n in range(LOGGED))


def blocked(rank: int, child: int, number: int) -> str:
    """A block-buffering child's line, less the pid in its prefix."""
    return f"blocked {rank} {child} {number} " + "b" * (number % 90)


BLOCKED_CHILD = """
import ctypes, os, sys, time
sys.path.insert(0, sys.argv[1])
from census import BLOCKED, blocked
rank, child = int(sys.argv[2]), int(sys.argv[3])
prefix = f"(Blocked{child} pid={os.getpid()}) "
os.write(2, f"{prefix}hello {rank}\\n".encode())
time.sleep(0.5)
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
stream = ctypes.c_void_p(libc.fdopen(2, b"w"))
libc.setvbuf(stream, None, 0, ctypes.c_size_t(4096))  # by blocks, as C does with a file
for n in range(BLOCKED):
    libc.fputs(f"{prefix}{blocked(rank, child, n)}\\n".encode(), stream)
    time.sleep(0.001)
libc.fflush(stream)
"""

FORKING_CHILD = """
import os, sys
rank, lines = sys.argv[1], int(sys.argv[2])
pid = os.fork()
for n in range(lines):
    os.write(1, f"fork {rank} {'parent' if pid else 'child'} {n}\\n".encode())
if pid:
    os.waitpid(pid, 0)
"""


class Scribe:
    """One rank."""

    def __init__(self, rank: int) -> None:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK="0")
        self.rank = rank

    def facts(self) -> dict[str, Any]:
        import ray

        return {"rank": self.rank, "pid": os.getpid(), "actor": ray.get_runtime_context().get_actor_id()}

    def write(self, begin_at: float) -> None:
        """Everything, stdout and stderr at once; the identical lines begin at the same moment on all ranks."""
        jobs = [
            *(threading.Thread(target=self._print, args=(thread,)) for thread in range(THREADS)),
            *(threading.Thread(target=job) for job in (self._write, self._puts, self._others_out, self._err)),
            threading.Thread(target=self._identical, args=(begin_at,)),
        ]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()

    def _print(self, thread: int) -> None:
        for n in range(PRINTED):
            print("print", self.rank, thread, n)

    def _write(self) -> None:
        for n in range(WRITTEN):
            os.write(1, f"os.write {self.rank} {n}\n".encode())

    def _puts(self) -> None:
        libc = ctypes.CDLL(None)
        for n in range(WRITTEN_BY_C):
            libc.puts(f"puts {self.rank} {n}".encode())

    def _identical(self, begin_at: float) -> None:
        time.sleep(max(0.0, begin_at - time.time()))
        for n in range(IDENTICAL):
            print(f"the same line {n} of every rank")

    def _others_out(self) -> None:
        for n in range(HUGE):
            print(huge(self.rank, n))
        subprocess.run([sys.executable, "-c", FORKING_CHILD, str(self.rank), str(FORKED)], check=True)

    def _err(self) -> None:
        """One after the other: what is half a line must not meet another writer's."""
        logger = logging.getLogger("census")
        logger.propagate = False
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s:%(name)s:%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        for n in range(LOGGED):
            logger.info("logged %d %d", self.rank, n)
        for n in range(BINARY):
            os.write(2, binary(self.rank, n) + b"\n")
        for n in range(PARTIAL):
            sys.stderr.write(f"partial {self.rank} {n} ...")
            sys.stderr.flush()
            time.sleep(0.2 if n else 1.6)
            sys.stderr.write(" done\n")
        script = f"for n in $(seq 0 {APPENDED - 1}); do echo append {self.rank} $n >> /dev/stderr; done"
        subprocess.run(["sh", "-c", script], check=True)
        here = os.path.dirname(os.path.abspath(__file__))
        children = [
            subprocess.Popen([sys.executable, "-c", BLOCKED_CHILD, here, str(self.rank), str(child)])
            for child in range(2)
        ]
        for process in children:
            process.wait()

    def clobber(self, stage: str) -> tuple[int, int]:
        """Lose what of stderr is not yet read: ``>`` reopens the file and empties it.

        `stage` is a folder by which the test is told to hold the receiver's answers: an agent that waits for one looks at
        sizes, and sends nothing. Returns the size the file had, and how many bytes of it were written meanwhile.
        """
        place = Path(stage)
        (place / "hold").touch()
        while not (place / "held").exists():  # so that there is a request to hold
            os.write(2, b"before\n")
            time.sleep(0.05)
        doomed = sum(os.write(2, f"doomed {n}\n".encode()) for n in range(DOOMED))
        time.sleep(2.5)  # seen for certain, by an agent that may have been restarted just before
        size = os.fstat(2).st_size
        subprocess.run(["sh", "-c", "echo clobbered > /dev/stderr"], check=True)
        time.sleep(0.5)
        os.write(2, b"after all\n")
        (place / "over").touch()
        return size, doomed


class Victim:
    """Writes until it is killed, and tells somebody outside what write(2) accepted."""

    def pid(self) -> int:
        return os.getpid()

    def write_for_ever(self, ledger_port: int) -> None:
        ledger = socket.create_connection(("127.0.0.1", ledger_port))
        for n in _count():
            os.write(1, f"victim {n} {'v' * (n % 300)}\n".encode())
            ledger.sendall(b"%d\n" % n)
            if n % 200 == 0:
                time.sleep(0.001)  # the other ranks are the census; this one is to die in the middle of a write


def _count() -> Iterator[int]:
    n = 0
    while True:
        yield n
        n += 1


def main() -> None:
    import ray

    ledger_port, facts_file = int(sys.argv[1]), sys.argv[2]
    ray.init(num_cpus=2, include_dashboard=False)
    scribe, victim = ray.remote(num_cpus=0)(Scribe), ray.remote(num_cpus=0, max_concurrency=2)(Victim)
    killed = victim.remote()
    scribes = [scribe.remote(rank) for rank in range(RANKS)]
    facts = ray.get([s.facts.remote() for s in scribes])
    victim_pid = ray.get(killed.pid.remote())
    print("census: all are here", flush=True)
    doomed = killed.write_for_ever.remote(ledger_port)
    done = [s.write.remote(time.time() + 3) for s in scribes]
    time.sleep(2)
    os.kill(victim_pid, 9)
    try:
        ray.get(doomed)
    except ray.exceptions.RayActorError:
        print("census: the victim is dead", flush=True)
    ray.get(done)
    clobbered, doomed_bytes = ray.get(scribes[CLOBBERED_RANK].clobber.remote(os.path.dirname(facts_file)))
    found = {"scribes": facts, "victim": victim_pid, "clobbered_bytes": clobbered, "doomed_bytes": doomed_bytes}
    with open(facts_file, "w") as out:
        json.dump(found, out)
    print("census: all have written", flush=True)


if __name__ == "__main__":
    main()
