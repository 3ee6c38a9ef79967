"""Run ids and node addresses."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from skyrl_otel.collector import node_ip
from skyrl_otel.config import Config, is_run_id
from skyrl_otel.terminal import run_id


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"SKYRL_OTEL_RUN_ID": "mine", "SLURM_JOB_ID": "7"}, "mine"),
        (
            {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"metadata": {"job_submission_id": "raysubmit_x/1"}})},
            "raysubmit_x-1",
        ),
        ({"RAY_JOB_CONFIG_JSON_ENV_VAR": "no json", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2"}, "slurm-7-2"),
    ],
)
def test_a_job_names_its_run(environ: dict[str, str], expected: str) -> None:
    assert run_id.choose(Config.from_env(environ), environ) == expected


def test_two_runs_have_two_names() -> None:
    names = {run_id.choose(Config.from_env({}), {}) for _ in range(100)}
    assert len(names) == 100
    assert all(is_run_id(name) for name in names)


def test_a_given_address_wins() -> None:
    assert node_ip.find({"RAY_ADDRESS": "127.0.0.1:6379"}, given="10.1.2.3") == "10.1.2.3"


def test_the_address_towards_the_cluster() -> None:
    assert node_ip.find({"RAY_ADDRESS": "127.0.0.1:6379"}) == "127.0.0.1"


def test_the_address_towards_the_cluster_on_this_node(tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:6379\n")
    assert node_ip.find({"RAY_TMPDIR": str(tmp_path)}) == "127.0.0.1"


@pytest.mark.parametrize("address", ["auto", "local", "ray://127.0.0.1:10001", "no.such.host.invalid:1", ":99999", ""])
def test_without_a_usable_address_the_default_route_decides(address: str, tmp_path: Path) -> None:
    found = node_ip.find({"RAY_ADDRESS": address, "RAY_TMPDIR": str(tmp_path)})
    socket.inet_aton(found)
    with socket.socket() as listener:
        listener.bind((found, 0))
