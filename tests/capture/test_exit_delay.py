"""Invariant 1: a process ends when it would have ended without us. Ray's processes: `tests/ray/test_exit_delay.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.capture.conftest import ROOT, environment
from tests.exits import LIMIT_S, STATES, State, added_s, node_with_collector, since

PROGRAM = """
import logging, sys, time
for number in range(200):
    print("line", number)
logging.warning("last words")
print("no end", end="")
open(sys.argv[1], "w").write(repr(time.monotonic()))
"""
ATTACH = "import skyrl_otel; skyrl_otel.attach()\n"
# As `skyrl-otel run` starts its program.
INJECT = {"SKYRL_OTEL_LAUNCHER": "1", "PYTHONPATH": f"{ROOT / 'skyrl_otel' / 'capture' / 'inject'}{os.pathsep}{ROOT}"}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    ("attach", "inject", "around"),
    [
        pytest.param(ATTACH, {}, {}, id="attach"),
        pytest.param("", INJECT, {}, id="run"),
        pytest.param("", INJECT, {"RANK": "1", "WORLD_SIZE": "2"}, id="rank"),
    ],
)
def test_invariant_1_the_exit_is_not_delayed(
    spool_root: Path, tmp_path: Path, state: State, attach: str, inject: dict[str, str], around: dict[str, str]
) -> None:
    stamp = tmp_path / "stamp"

    def exit_s(script: str, env: dict[str, str]) -> float:
        subprocess.run([sys.executable, "-c", script, str(stamp)], env=env, capture_output=True, check=True, timeout=60)
        return since(stamp)

    with node_with_collector(spool_root, state) as node:
        ours = environment(spool_root, SKYRL_OTEL_RUN_ID=node.run.run_id, **around) | inject
        added = added_s(lambda: exit_s(attach + PROGRAM, ours), lambda: exit_s(PROGRAM, {**os.environ, **around}))
    assert added < LIMIT_S
