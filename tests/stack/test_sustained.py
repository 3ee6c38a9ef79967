"""Two minutes at full speed through agent, collector, file and Loki on this machine: the figure, and whose the ceiling is."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from skyrl_otel.spool import token
from skyrl_otel.spool.token import Shipping
from tests.agent.conftest import Node
from tests.stack.processes import TOKEN, Loki, Otelcol, wait_for

pytestmark = [pytest.mark.collector, pytest.mark.loki, pytest.mark.timeout(500)]

WARM_UP_S, MEASURED_S, WITHOUT_LOKI_S = 20.0, 120.0, 30.0
BACKLOG_BYTES = 30_000_000
LINE = (
    b"(EngineCore pid=%d) INFO %b [loggers.py:257] Engine 000: Avg prompt throughput: %d.3 tokens/s, Running: 8 reqs\n"
)


class Load:
    """Keeps the spool's backlog at `BACKLOG_BYTES`: the agent never waits for lines, and the disk never for the agent."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.writers = [node.writer(role="rollout", rank=rank) for rank in range(4)]
        self.lines = 0
        self.size = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.is_set():
            if int(self.node.status().get("backlog_bytes", 0)) > BACKLOG_BYTES:
                time.sleep(0.05)
                continue
            for writer in self.writers:
                when = time.strftime("%m-%d %H:%M:%S").encode()
                chunk = b"".join(LINE % (os.getpid(), when, self.lines + n) for n in range(2_000))
                os.write(writer.fds["out"], chunk)
                self.lines += 2_000
                self.size += len(chunk)
            time.sleep(0.1)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


def test_two_minutes(spool_root: Path) -> None:
    loki = Loki(spool_root / "loki")
    otelcol = Otelcol(spool_root / "otelcol", loki, OTELCOL_QUEUE_BYTES="50000000")
    node = Node(spool_root)
    load = None
    try:
        loki.start()
        otelcol.start()
        token.write(node.run, Shipping(f"{otelcol.url}/v1/logs", {"authorization": f"Bearer {TOKEN}"}, timeout_s=30.0))
        load = Load(node)
        node.start()
        time.sleep(WARM_UP_S)
        before, spent_before, began = _lines_in(loki), _cpu(node, otelcol, loki), time.monotonic()
        time.sleep(MEASURED_S)
        took = time.monotonic() - began
        after, spent = _lines_in(loki), _cpu(node, otelcol, loki)
        cpu = {name: round((spent[name] - spent_before[name]) / took, 2) for name in spent}
        queue = otelcol.metric("otelcol_exporter_queue_size") / otelcol.metric("otelcol_exporter_queue_capacity")
        load.stop()
        wait_for(lambda: node.status()["backlog_bytes"] == 0, "the agent is done", 200, 1.0)
        # A count per minute and no more: one over everything competes with what is still coming in.
        wait_for(lambda: _lines_in(loki) >= load.lines, "Loki has all", 200, 2.0)
        rate = (after - before) / took
        figure = {
            "lines_per_s": round(rate),
            "mb_per_s": round(rate * load.size / load.lines / 1e6, 2),
            "cores": os.cpu_count(),
            "cores_used": cpu,
            "peak_mb": {"otelcol": round(otelcol.memory_mb()), "loki": round(loki.memory_mb())},
            "lines": load.lines,
            "counted": loki.count('{skyrl_run_id="run"} |= "Engine 000"')[""],
            "loki_disk_bytes_per_line": round(loki.disk_bytes() / load.lines, 1),
            "queue_before_loki_full": round(queue, 2),
            "ceiling": _ceiling(queue, cpu),
        }
        print(json.dumps(figure))
        assert figure["counted"] == load.lines
        status = node.status()
        assert status["lost_bytes"] == status["rejected_records"] == 0
    finally:
        if load is not None:
            load.stop()
        node.close()
        otelcol.kill()
        loki.kill()


def test_without_loki_it_is_faster(spool_root: Path) -> None:
    """The same for half a minute with the collector's file alone: what agent and collector could do for a faster Loki."""
    otelcol = Otelcol(spool_root / "otelcol", None)
    node = Node(spool_root)
    load = None
    try:
        otelcol.start()
        token.write(node.run, Shipping(f"{otelcol.url}/v1/logs", {"authorization": f"Bearer {TOKEN}"}, timeout_s=30.0))
        load = Load(node)
        node.start()
        time.sleep(5.0)
        before, spent_before, began = _accepted(otelcol), _cpu(node, otelcol), time.monotonic()
        time.sleep(WITHOUT_LOKI_S)
        took = time.monotonic() - began
        rate, spent = (_accepted(otelcol) - before) / took, _cpu(node, otelcol)
        cpu = {name: round((spent[name] - spent_before[name]) / took, 2) for name in spent}
        print(json.dumps({"lines_per_s_without_loki": round(rate), "cores_used": cpu}))
        status = node.status()
        assert rate > 0 and status["lost_bytes"] == status["rejected_records"] == 0
    finally:
        if load is not None:
            load.stop()
        node.close()
        otelcol.kill()


def _ceiling(queue: float, cpu: dict[str, float]) -> str:
    """What the rate hangs on. Which of the two it is differs between machines, so that no test may ask for one."""
    if queue > 0.5:
        return "loki: the queue in front of it is full"
    most = max(cpu, key=lambda name: cpu[name])
    used, cores = sum(cpu.values()), os.cpu_count() or 1
    if used > 0.8 * cores:
        return f"processor: {used:.2f} of {cores} cores are used, {cpu[most]:.2f} of them by {most}"
    return "none of these: the disk, or what else this machine did"


def _accepted(otelcol: Otelcol) -> float:
    return otelcol.metric("otelcol_receiver_accepted_log_records")


def _lines_in(loki: Loki) -> float:
    return loki.metric("loki_distributor_lines_received_total")


def _cpu(node: Node, otelcol: Otelcol, loki: Loki | None = None) -> dict[str, float]:
    """Seconds of processor time used so far."""
    fields = Path(f"/proc/{node.status()['pid']}/stat").read_text().rpartition(")")[2].split()
    used = {
        "agent": (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
        "otelcol": otelcol.cpu_s(),
    }
    return used | {"loki": loki.cpu_s()} if loki is not None else used
