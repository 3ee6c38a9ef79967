"""The handler among the frameworks themselves: the released SkyRL, a real vLLM engine in a Ray actor."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.capture.conftest import Host, environment, host, spool, written
from tests.capture.frames import taken

__all__ = ["host", "spool"]  # fixtures of the capture tests

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

ROUTES = """
[[route]]
match = { scope = "vllm*", process = ["EngineCore*", "VLLM*"] }
to = "vllm.log"
[[route]]
to = "skyrl.log"
"""


def _script(name: str) -> str:
    return subprocess.run([ROOT / "scripts" / name], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


@pytest.mark.parametrize("mode", ["infra", "followed"])
def test_skyrls_own_logging_set_up_before_and_after_and_again(
    host: Host, spool: Path, mode: str, tmp_path: Path
) -> None:
    script = f"""
import logging, sys
from loguru import logger
from skyrl.train.utils.utils import configure_ray_worker_logging
configure_ray_worker_logging()
logging.getLogger("before").info("not attached yet")
import skyrl_otel; skyrl_otel.attach(channel={"infra" if mode == "infra" else "progress"!r})
log = logging.getLogger("vllm.engine"); lone = logging.getLogger("lone"); lone.propagate = False
lone.setLevel("INFO"); lone.addHandler(logging.StreamHandler())
for number in range(50):
    log.info("std %d", number)
    logger.info("loguru {{}}", number)
    lone.info("lone %d", number)
    if number % 3 == 0:
        configure_ray_worker_logging()
    if number % 7 == 0:
        logging.basicConfig(force=True, level="INFO")
logger.complete()
"""
    path = f"{ROOT}:{_script('skyrl-env')}"
    with open(tmp_path / "err", "ab") as file:
        host(script, env={"PYTHONPATH": path}, stderr=file, stdout=file)
    records = [record for folder in written(spool) for record in taken(folder.path)]
    counted = Counter((record.scope, record.body) for record in records)
    wanted = Counter(
        pair
        for number in range(50)
        for pair in (("vllm.engine", f"std {number}"), ("__main__", f"loguru {number}"), ("lone", f"lone {number}"))
    )
    assert counted == wanted
    if mode == "infra":
        assert all(folder.text(name) == b"" for folder in written(spool) for name in ("out", "err"))


@dataclass
class Job:
    rows: list[dict[str, object]]
    files: dict[str, list[str]]
    terminal: str


@pytest.fixture(scope="module")
def job() -> Iterator[Job]:
    with tempfile.TemporaryDirectory(prefix="sk-vllm-", dir="/var/tmp", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        (root / "spool").mkdir(mode=0o700)
        (root / "settings.toml").write_text(ROUTES)
        env = {
            **environment(root / "spool"),
            "PYTHONPATH": f"{ROOT}",
            "SKYRL_OTEL_CONFIG": str(root / "settings.toml"),
            "SKYRL_OTEL_LOG_DIR": str(root / "logs"),
            "SKYRL_OTEL_DRAIN_S": "60",
            "SKYRL_OTEL_RAISE": "",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "RAY_TMPDIR": str(root / "ray"),
            "RAY_AUTH_MODE": "disabled",
        }
        # SkyRL's folder last: numpy, torch and the like are the engine's own.
        python = _script("vllm-env")
        program = str(ROOT / "tests" / "stack" / "programs" / "vllm_job.py")
        env["SKYRL_LIB"] = _script("skyrl-env")
        site = root / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text("import os, sys\nsys.path.append(os.environ['SKYRL_LIB'])\n")
        env["PYTHONPATH"] = f"{ROOT}:{site}"
        command = [sys.executable, "-m", "skyrl_otel", "run", "--", python, program, str(root / "model")]
        (root / "model").mkdir()
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600, cwd=root)
        terminal = done.stdout.decode(errors="replace")
        print(terminal[-6000:])
        assert done.returncode == 0, terminal[-3000:]
        store = next((root / "logs").glob("*.db"))
        with sqlite3.connect(store) as db:
            db.row_factory = sqlite3.Row
            query = (
                "SELECT records.*, scopes.name AS scope_name, resources.attributes AS who FROM records"
                " JOIN scopes ON scopes.id = scope JOIN resources ON resources.id = resource"
            )
            rows = [dict(row) for row in db.execute(query)]
        files = {path.name: path.read_text().splitlines() for path in (root / "logs").glob("*.log")}
        yield Job(rows, files, terminal)


def _child(row: dict[str, object]) -> str:
    """Which process a line named in its prefix."""
    return str(json.loads(str(row["attributes"] or "{}")).get("skyrl.child", ""))


def _is_vllms(row: dict[str, object]) -> bool:
    """The truth, told without the router: by logger, by vLLM's prefix, by the actor."""
    who = json.loads(str(row["who"]))
    if _child(row) == "EngineCore" or str(row["scope_name"]).startswith("vllm"):
        return True
    return who.get("ray.actor.class", "").startswith("VLLM")


def test_each_record_of_a_vllm_actor_is_recorded_once_with_its_logger(job: Job) -> None:
    tags = Counter((row["scope_name"], row["body"]) for row in job.rows if str(row["body"]).startswith("tag "))
    loggers = (
        ("vllm.tagged", "vllm"),
        ("skyrl.policy", "skyrl"),
        ("harbor.env", "harbor"),
        ("examples.train", "examples"),
    )
    assert tags == Counter((scope, f"tag {name} {n}") for scope, name in loggers for n in range(20))
    echoes = [row["body"] for row in job.rows if " tag " in str(row["body"])]
    assert not echoes, "the console's echo was recorded too"
    assert any(str(row["scope_name"]).startswith("vllm.") for row in job.rows), "vLLM's own records"


def test_the_split_puts_each_record_in_its_file(job: Job) -> None:
    vllm, skyrl = job.files["vllm.log"], job.files["skyrl.log"]
    firsts = {"vllm.log": set(vllm), "skyrl.log": set(skyrl)}
    wrong = []
    for row in job.rows:
        name, other = ("vllm.log", "skyrl.log") if _is_vllms(row) else ("skyrl.log", "vllm.log")
        line = str(row["body"]).splitlines()[0][:60] if str(row["body"]).strip() else ""
        if line and not any(line in found for found in firsts[name]) and any(line in found for found in firsts[other]):
            wrong.append((name, row["scope_name"], line))
    assert not wrong
    records = sum(not line.startswith("    ") for line in vllm + skyrl)
    assert records == len(job.rows), "a record is in neither file, or in both"
    core = [row for row in job.rows if _child(row) == "EngineCore"]
    assert core and any("(EngineCore pid=" in line for line in vllm)
    assert not any("(EngineCore pid" in line for line in skyrl)
    for channel in ("infra", "progress"):
        assert not any(lines for name, lines in job.files.items() if name.startswith(channel))
