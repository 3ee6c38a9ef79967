"""What the agent costs with many writers: 1,000 that are quiet, and growing numbers that write a line a second each."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.agent import cpu_s, peak_rss_mb, tree
from skyrl_otel.agent import start
from skyrl_otel.spool import layout, library, token
from skyrl_otel.spool.token import Shipping
from skyrl_otel.spool.writer import WriterFolder

ROOT = Path(__file__).resolve().parent.parent
SPOOLS = 1000
ACTIVE = (100, 300, 1000)


def run(quick: bool) -> dict[str, object]:
    """Measure half a minute each; `quick` ten seconds."""
    seconds = 10 if quick else 30
    with tempfile.TemporaryDirectory(prefix="sk-idle-", dir="/var/tmp", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        run = layout.open_run(root, "bench")
        writers = [
            WriterFolder.create(run, facts={"role": "rollout", "rank": rank, "pid": os.getpid()})
            for rank in range(SPOOLS)
        ]
        sink = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.sink", str(root / "sink")], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert sink.stdout is not None
        token.write(run, Shipping(f"http://127.0.0.1:{int(sink.stdout.readline())}/v1/logs", {}, compression="none"))
        agent = subprocess.Popen(start.command(library.ensure(run), run))
        try:
            _write(writers, 3)
            time.sleep(15)  # all of it is sent, and every writer is left to inotify
            quiet = _share(agent.pid, seconds, lambda: time.sleep(seconds))
            active = {}
            for count in ACTIVE:
                active[count] = _share(agent.pid, seconds, lambda count=count: _write(writers[:count], seconds))
            rss_mb = sum(map(peak_rss_mb, tree(agent.pid)))
        finally:
            agent.terminate()
            agent.wait()
            sink.kill()
            sink.wait()
            for writer in writers:
                writer.close()
    return {
        "cpu_percent": round(quiet, 3),
        **{f"cpu_percent_{count}_active": round(share, 2) for count, share in active.items()},
        "cpu_percent_per_active_100": round(active[100] / 100, 4),
        "cpu_percent_per_active_1000": round(active[1000] / 1000, 4),
        "rss_mb": round(rss_mb, 1),
        "spools": SPOOLS,
        "seconds": seconds,
        "rounds": 1,
    }


def _write(writers: list[WriterFolder], seconds: int) -> None:
    """A line a second from each, spread over the second."""
    began = time.monotonic()
    for number in range(seconds * len(writers)):
        ahead = began + number / len(writers) - time.monotonic()
        if ahead > 0:
            time.sleep(ahead)
        when = time.strftime("%m-%d %H:%M:%S")
        line = f"(EngineCore pid=28789) INFO {when} [core.py:402] line {number}\n"
        os.write(writers[number % len(writers)].fds["out"], line.encode())


def _share(pid: int, seconds: int, work: object) -> float:
    """Percent of a core that the agent and its parent took while `work` ran."""
    before = sum(map(cpu_s, tree(pid)))
    began = time.monotonic()
    assert callable(work)
    work()
    return 100 * (sum(map(cpu_s, tree(pid))) - before) / (time.monotonic() - began)
