"""Invariant 1 on Ray: a driver and an actor end when they would have ended without us, whatever the collector does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from skyrl_otel.spool.layout import RunDir
from tests.capture.conftest import ROOT
from tests.exits import LIMIT_S, STATES, State, added_s, node_with_collector, since
from tests.ray.conftest import Cluster, ray_environment

pytestmark = [pytest.mark.ray, pytest.mark.long]

DRIVER = """
import logging, sys, time, ray
ray.init(configure_logging=False)
@ray.remote
def task():
    print("in a task")
ray.get(task.remote())
for number in range(200):
    print("line", number)
logging.warning("last words")
open(sys.argv[1], "w").write(repr(time.monotonic()))
"""

ACTOR = """
import logging, os, sys, time, ray
ray.init(configure_logging=False)
@ray.remote(num_cpus=0)
class Actor:
    def work(self):
        for number in range(200):
            print("line", number)
        logging.warning("last words")
        return os.getpid()
took = []
for _ in range(2):
    actor = Actor.remote()
    pid = ray.get(actor.work.remote())
    began = time.monotonic()
    actor.__ray_terminate__.remote()
    while os.path.exists(f"/proc/{pid}"):
        time.sleep(0.002)
    took.append(time.monotonic() - began)
open(sys.argv[1], "w").write(repr(min(took)))
"""


def _under_run(cluster: Cluster, run: RunDir) -> dict[str, str]:
    return ray_environment(
        RAY_ADDRESS=cluster.address,
        SKYRL_OTEL_LAUNCHER="1",
        SKYRL_OTEL_RAISE="1",
        SKYRL_OTEL_RUN_ID=run.run_id,
        SKYRL_OTEL_SPOOL_DIR=str(run.path.parent),
        PYTHONPATH=os.pathsep.join([str(ROOT / "skyrl_otel" / "capture" / "inject"), str(ROOT)]),
    )


def _ran(script: str, stamp: Path, env: dict[str, str]) -> None:
    subprocess.run([sys.executable, "-c", script, str(stamp)], env=env, capture_output=True, check=True, timeout=90)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("state", STATES)
def test_invariant_1_a_drivers_exit_is_not_delayed(
    cluster: Cluster, spool_root: Path, tmp_path: Path, state: State
) -> None:
    stamp = tmp_path / "stamp"

    def exit_s(env: dict[str, str]) -> float:
        _ran(DRIVER, stamp, env)
        return since(stamp)

    with node_with_collector(spool_root, state) as node:
        ours, bare = _under_run(cluster, node.run), ray_environment(RAY_ADDRESS=cluster.address)
        # A driver waits for threads of Ray's that look up a few times a second.
        assert added_s(lambda: exit_s(ours), lambda: exit_s(bare), middle=True) < LIMIT_S


@pytest.mark.timeout(400)
@pytest.mark.parametrize("state", STATES)
def test_invariant_1_an_actors_end_is_not_delayed(
    cluster: Cluster, spool_root: Path, tmp_path: Path, state: State
) -> None:
    stamp = tmp_path / "took"

    def end_s(env: dict[str, str]) -> float:
        _ran(ACTOR, stamp, env)
        return float(stamp.read_text())

    with node_with_collector(spool_root, state) as node:
        ours, bare = _under_run(cluster, node.run), ray_environment(RAY_ADDRESS=cluster.address)
        assert added_s(lambda: end_s(ours), lambda: end_s(bare), middle=True) < LIMIT_S
        assert state != "alive" or any("ray.actor.id" in record.resource for record in node.receiver.records)
