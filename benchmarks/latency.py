"""From write(2) to the receiver: how long a line is under way when 1,000 of them a second are written.

The real agent reads a writer whose identity is complete; the receiver is a process of its own. Each line carries the clock of its
write, the sink the clock of each request's arrival.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import quantiles

from benchmarks.sink import arrivals
from skyrl_otel.agent import start
from skyrl_otel.spool import layout, library, token
from skyrl_otel.spool.token import Shipping
from skyrl_otel.spool.writer import WriterFolder

ROOT = Path(__file__).resolve().parent.parent
RATE = 1000
_STAMP = re.compile(rb"written at (\d+) ns")


def run(quick: bool) -> dict[str, object]:
    """Measure for 20 seconds; `quick` for five."""
    seconds = 5 if quick else 20
    with tempfile.TemporaryDirectory(prefix="sk-latency-", dir="/var/tmp", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        run = layout.open_run(root, "bench")
        writer = WriterFolder.create(run, facts={"role": "rollout", "rank": 0})
        sink = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.sink", str(root / "sink")], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert sink.stdout is not None
        token.write(run, Shipping(f"http://127.0.0.1:{int(sink.stdout.readline())}/v1/logs", {}, compression="none"))
        agent = subprocess.Popen(start.command(library.ensure(run), run))
        try:
            time.sleep(2)
            _write(writer.fds["out"], seconds)
            time.sleep(2)
            found = sorted(_latencies(root / "sink"))
        finally:
            writer.close()
            agent.terminate()
            sink.kill()
            agent.wait()
            sink.wait()
    assert len(found) == seconds * RATE, f"{len(found)} of {seconds * RATE} lines arrived"
    cuts = quantiles(found, n=1000)
    return {
        "p50_s": round(cuts[499], 4),
        "p99_s": round(cuts[989], 4),
        "p999_s": round(cuts[998], 4),
        "max_s": round(found[-1], 4),
        "lines": len(found),
        "lines_per_s": RATE,
        "rounds": 1,
    }


def _write(descriptor: int, seconds: int) -> None:
    began = time.monotonic()
    for number in range(seconds * RATE):
        ahead = began + number / RATE - time.monotonic()
        if ahead > 0:
            time.sleep(ahead)
        when = time.strftime("%m-%d %H:%M:%S")
        head = f"(EngineCore pid=28789) INFO {when} [core.py:402] line {number}"
        os.write(descriptor, f"{head} written at {time.time_ns()} ns\n".encode())


def _latencies(path: Path) -> list[float]:
    return [(at - int(stamp)) / 1e9 for at, body in arrivals(path) for stamp in _STAMP.findall(body)]
