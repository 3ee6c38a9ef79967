"""A replay a day late is taken by Loki as we configure it; two days late it is refused, and that is explained."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from skyrl_otel.agent.ship import Answer, Client
from skyrl_otel.query.explain import explain
from skyrl_otel.spool.token import Shipping
from tests.collector_process import Line, request
from tests.stack.processes import Loki, wait_for

pytestmark = [pytest.mark.loki, pytest.mark.timeout(200)]

HOUR = 3600 * 10**9


def _post(loki: Loki, body: str, time_unix_nano: int, run: str = "late") -> Answer:
    """As an agent would that sends to Loki itself."""
    resource = {"service.name": "policy", "service.namespace": "p", "skyrl.run.id": run, "skyrl.channel": "infra"}
    made = request([Line(body, (0, 1), time=time_unix_nano)], resource)
    client = Client(Shipping(f"{loki.url}/otlp/v1/logs", {}))
    try:
        return client.post(made.SerializeToString())
    finally:
        client.close()


def test_how_late_a_replay_may_come(spool_root: Path) -> None:
    loki = Loki(spool_root / "loki")
    now = time.time_ns()
    try:
        loki.start()
        assert _post(loki, "now", now).verdict == "accepted"
        assert _post(loki, "a day late", now - 24 * HOUR).verdict == "accepted"
        wait_for(lambda: loki.count('{skyrl_run_id="late"}', window="30h") == {"": 2}, "both are there")
        answer = _post(loki, "two days late", now - 48 * HOUR)
        assert answer.verdict == "refused"
        print(answer.reason)
        assert "max_chunk_age" in (explain(answer.reason) or "")
        done = subprocess.run(
            [sys.executable, "-m", "skyrl_otel", "doctor", "--loki", loki.url],
            env={"PATH": os.environ["PATH"], "SKYRL_OTEL_SPOOL_DIR": str(spool_root / "none")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert "refused 1 lines since it began, too_far_behind: " in done.stdout
        assert "ingester.max_chunk_age" in done.stdout
        _follow(loki)
    finally:
        loki.kill()


def _follow(loki: Loki) -> None:
    """`logs --loki -f`: what comes is shown as it comes, once, and what a limit left out is not new."""
    for n in range(3):
        assert _post(loki, f"early {n}", time.time_ns(), "live").verdict == "accepted"
    following = subprocess.Popen(
        [sys.executable, "-m", "skyrl_otel", "logs", "--loki", loki.url, "--run", "live", "-f", "-n", "1"],
        env={"PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert following.stdout is not None
    try:
        assert following.stdout.readline().endswith("policy early 2\n")
        for n in range(3):
            assert _post(loki, f"new {n}", time.time_ns(), "live").verdict == "accepted"
            assert following.stdout.readline().endswith(f"policy new {n}\n")
    finally:
        following.terminate()
        following.communicate()
