"""Two real Ray nodes without a shared disk: both nodes' lines arrive at the driver's embedded collector."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.stack import two_nodes_job
from tests.stack.nodes import NAMES, two_nodes

pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]


def test_both_nodes_arrive_at_the_drivers_collector() -> None:
    with two_nodes() as nodes:
        logs = nodes.base / "logs"
        environment = {
            "SKYRL_OTEL_LOG_DIR": str(logs),
            "SKYRL_OTEL_RUN_ID": "two",
            "SKYRL_OTEL_DRAIN_S": "30",
            "OTEL_EXPORTER_OTLP_HEADERS": "x-secret=not-for-ray",
        }
        command = [sys.executable, "-m", "skyrl_otel", "run", "--", sys.executable, two_nodes_job.__file__]
        done = nodes.run(command, environment, timeout_s=240)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"written on {NAMES[0]} {NAMES[1]}" in done.stdout.splitlines()
        assert "line 1" not in done.stdout
        listed = subprocess.run(
            [sys.executable, "-m", "skyrl_otel", "logs", "--run", "two", "--json"],
            env={"PATH": "/usr/bin:/bin", **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        records = [json.loads(line) for line in listed.stdout.splitlines()]
        by_node: dict[str, Counter[str]] = {name: Counter() for name in NAMES}
        for record in records:
            if record["resource"].get("ray.actor.name", "").startswith("writer-"):
                by_node[record["resource"]["host.name"]][record["body"]] += 1
        for node, name in zip(NAMES, ("one", "two"), strict=True):
            expected = {f"{name} line {n}": 1 for n in range(two_nodes_job.LINES)} | {f"{name} child": 1}
            assert {body: count for body, count in by_node[node].items() if body.startswith(name)} == expected
        raylets = {r["resource"]["host.name"] for r in records if r["resource"].get("service.name") == "raylet"}
        assert raylets == set(NAMES), "Ray's own logs of both nodes are infra"
        _no_secret_in(nodes.base, logs)


def _no_secret_in(base: Path, logs: Path) -> None:
    """The token and the user's headers are in no log of Ray's on any node."""
    secrets = [path.read_text().strip() for path in base.rglob("store/secret")]
    assert len(secrets) == 1
    for log in [*base.glob("*/tmp/ray/**/*"), *logs.iterdir()]:
        if log.is_file() and not log.is_symlink() and log.stat().st_size < 50_000_000:
            content = log.read_bytes()
            for secret in (secrets[0], "not-for-ray"):
                assert secret.encode() not in content, f"{secret!r} is in {log}"
