"""A real vLLM engine that dies at its start leaves one ERROR record per process that logged its end, in order."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent.conftest import Node

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def node(spool_root: Path) -> Iterator[Node]:
    node = Node(spool_root)
    yield node
    node.close()


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_each_process_has_one_record_with_its_whole_traceback(node: Node, tmp_path: Path) -> None:
    python = subprocess.run([ROOT / "scripts/vllm-env"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    folder = node.writer(role="rollout")
    node.ship()
    node.start()
    done = subprocess.run(
        [python, str(ROOT / "tests/stack/vllm_death.py"), str(tmp_path / "tiny")],
        stdout=folder.fds["out"],
        stderr=folder.fds["err"],
        env={**os.environ, "TZ": "UTC"},
        check=False,
        timeout=600,
    )
    assert done.returncode == 1
    folder.close()
    node.folders.remove(folder)
    node.receiver.wait(lambda: bool(node.receiver.events("skyrl.process.end")), 30)

    errors = [record for record in node.receiver.lines() if record.severity >= 17]
    logged = [record for record in errors if record.attributes.get("skyrl.child")]
    assert [record.attributes["skyrl.child"] for record in logged] == ["Worker", "EngineCore"]
    worker, engine = logged
    assert worker.body.startswith("WorkerProc failed to start.\nTraceback (most recent call last):\n")
    assert worker.attributes["exception.type"] == "AssertionError"
    assert worker.attributes["exception.message"] == "num_heads (2) is not divisible by num_kv_heads (3)"
    assert worker.body.endswith("AssertionError: num_heads (2) is not divisible by num_kv_heads (3)")
    assert engine.body.startswith("EngineCore failed to start.\nTraceback (most recent call last):\n")
    assert worker.time <= engine.time, "the root cause is first"
    assert worker.attributes["process.pid"] != engine.attributes["process.pid"]

    # The interpreter's own words at the end of the engine's process and of the main one, which name nobody.
    printed = [record for record in errors if not record.attributes.get("skyrl.child")]
    assert [record.attributes["exception.type"] for record in printed] == ["Exception", "RuntimeError"]
    assert "Engine core initialization failed" in printed[-1].attributes["exception.message"]
    assert all(record.body.startswith("Traceback (most recent call last):\n") for record in printed)
    assert not [line for line in node.receiver.lines() if line.body.startswith('  File "')], "a frame stands alone"
