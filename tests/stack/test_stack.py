"""What compose mounts, run on the real binaries: a two-node Ray job arrives whole, once, and where it belongs."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter

import pytest

from skyrl_otel.query.filters import Filter
from skyrl_otel.query.loki import Loki as LokiReader
from skyrl_otel.query.loki import LokiSource
from tests.stack import many_lines_job as job
from tests.stack.nodes import HOST, NAMES, two_nodes
from tests.stack.processes import HEADERS, Loki, Otelcol, wait_for

RAYS = re.compile(r"^\d{4}-\d\d-\d\d [\d:,]+\t(?:INFO|WARNING) \S+:\d+ -- ")

pytestmark = [pytest.mark.netns, pytest.mark.collector, pytest.mark.loki, pytest.mark.timeout(900)]

RUN = "stack"
OURS = f'{{skyrl_run_id="{RUN}"}} |~ "^(stack-line |{job.SAME}$)"'


def test_two_nodes_ship_to_collector_files_and_loki() -> None:
    with two_nodes() as nodes:
        loki = Loki(nodes.base / "loki", HOST)
        otelcol = Otelcol(nodes.base / "otelcol", loki, HOST)
        try:
            loki.start()
            otelcol.start()
            environment = {
                "OTEL_EXPORTER_OTLP_ENDPOINT": otelcol.url,
                "OTEL_EXPORTER_OTLP_HEADERS": HEADERS,
                "SKYRL_OTEL_RUN_ID": RUN,
                "SKYRL_OTEL_LOG_DIR": str(nodes.base / "logs"),
                "SKYRL_OTEL_DRAIN_S": "120",
            }
            command = [sys.executable, "-m", "skyrl_otel", "run", "--", sys.executable, job.__file__]
            done = nodes.run(command, environment, timeout_s=500)
            assert done.returncode == 0, done.stdout + done.stderr
            wait_for(lambda: loki.count(OURS).get("", 0) >= job.TOTAL, "all lines are in Loki", 240, 2.0)
            _check_stdout(otelcol, done)
            _check_files(otelcol)
            _check_loki(loki)
        finally:
            otelcol.kill()
            loki.kill()


def _check_stdout(otelcol: Otelcol, done: subprocess.CompletedProcess[str]) -> None:
    """Progress alone, and plain: what the terminal showed of the program."""
    printed = otelcol.stdout.read_text().splitlines()
    on_stdout = done.stdout.splitlines()
    # Ray's own lines are recognised: their body is the message without the header.
    on_stderr = [RAYS.sub("", line) for line in done.stderr.splitlines() if not line.startswith("skyrl-otel: ")]
    assert Counter(printed) == Counter(on_stdout + on_stderr)
    assert [line for line in printed if line in set(on_stdout)] == on_stdout
    steps = [f"step {step} reward 0.{step:02d}" for step in range(job.PROGRESS)]
    assert on_stdout[: job.PROGRESS] == steps
    took = re.fullmatch(r"the same 50000 lines took ([\d.]+) s", on_stdout[-1])
    assert took and float(took[1]) < 1.0


def _check_files(otelcol: Otelcol) -> None:
    """Infra alone, each record once."""
    records = [record for record in otelcol.recorded() if record["log.record.uid"]]
    assert all(record["skyrl.channel"] == "infra" or record.get("event.name") for record in records)
    bodies = [record["body"] for record in records]
    assert sum(body == job.SAME or body.startswith("stack-line ") for body in bodies) == job.TOTAL
    assert max(Counter(record["log.record.uid"] for record in records).values()) == 1
    assert len(otelcol.files()) > 1 or otelcol.files()[0].stat().st_size < 200_000_000


def _check_loki(loki: Loki) -> None:
    """The same number by uid and by ``count_over_time``; by actor, role and rank, node and run."""
    reader = LokiSource(LokiReader(loki.url), RUN)
    uids = Counter(
        record.attributes["log.record.uid"]
        for record in reader.read(Filter(channel="infra"))
        if record.body == job.SAME or record.body.startswith("stack-line ")
    )
    assert len(uids) == job.TOTAL and max(uids.values()) == 1
    assert loki.count(OURS) == {"": job.TOTAL}
    assert loki.count(OURS, by="skyrl_run_id") == {RUN: job.TOTAL}
    per_rank = job.SAME_EACH + job.OWN_EACH
    actors = {f"policy-{rank}": per_rank for rank in range(job.RANKS)}
    assert loki.count(OURS, by="ray_actor_name") == actors | {f"engine-{n}": job.ROLLOUT_EACH for n in ("one", "two")}
    ranks = {f"policy|{rank}": per_rank for rank in range(job.RANKS)}
    assert loki.count(OURS, by="skyrl_role,skyrl_rank") == ranks | {"rollout|": 2 * job.ROLLOUT_EACH}
    assert loki.count(OURS, by="host_name") == dict.fromkeys(NAMES, job.TOTAL // 2)
    assert loki.count(f'{{skyrl_run_id="{RUN}"}} |= "{job.SAME}"') == {"": job.RANKS * job.SAME_EACH}
    print(f"{job.TOTAL} by distinct uid = {job.TOTAL} by count_over_time")
