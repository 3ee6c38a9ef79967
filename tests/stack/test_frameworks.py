"""The handler among the frameworks themselves: the released SkyRL, a real vLLM engine in a Ray actor."""

from __future__ import annotations

import json
import math
import re
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from skyrl_otel.collector.decode import Row
from skyrl_otel.collector.resource import Resource, read_resource
from skyrl_otel.collector.text import LineFormat
from tests.capture.conftest import Host, environment, host, spool, written
from tests.capture.frames import taken
from tests.stack.output import keep, output_below

__all__ = ["host", "spool"]  # fixtures of the capture tests

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

ROUTES = """
[[route]]
match = { scope = "vllm*", process = "EngineCore*" }
to = "vllm.log"
[[route]]
match = { scope = ["skyrl*", "harbor*", "examples*"] }
to = "skyrl.log"
[[route]]
to = "rest.log"
"""
FILES = ("vllm.log", "skyrl.log", "rest.log")
TOKEN = re.compile(r"tok-[0-9a-f]{32}")
SPEAKER = "tests.stack.programs.vllm_speaker"


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


@dataclass(frozen=True)
class Stored:
    """A record in the store."""

    row: Row
    resource: Resource

    @property
    def attributes(self) -> dict[str, Any]:
        return json.loads(self.row.attributes) if self.row.attributes else {}

    @property
    def pid(self) -> int | None:
        """Of the child where the line names one."""
        return self.attributes.get("process.pid", self.resource.pid)

    @property
    def child(self) -> str:
        """What a process is called that an actor has started and that takes its own records."""
        return str(json.loads(self.resource.attributes).get("skyrl.child", ""))

    @property
    def text(self) -> str:
        """As it stands in a text file."""
        [lines] = filter(None, LineFormat().lines([self.row._replace(resource=0)], [self.resource]).values())
        return lines[0].rstrip("\n")


@dataclass(frozen=True)
class Job:
    records: list[Stored]
    files: dict[str, list[str]]
    ledger: list[dict[str, Any]]
    vllms_own: list[dict[str, Any]]

    def pids(self, producer: str) -> set[int]:
        """The processes that said so of themselves in the ledger."""
        return {said["pid"] for said in self.ledger if said["producer"].startswith(producer)}


@pytest.fixture(scope="module")
def job() -> Iterator[Job]:
    with tempfile.TemporaryDirectory(prefix="sk-vllm-", dir="/var/tmp", ignore_cleanup_errors=True) as folder:
        yield _run(Path(folder))


def _run(root: Path) -> Job:
    for name in ("spool", "site", "model"):
        (root / name).mkdir(mode=0o700)
    (root / "settings.toml").write_text(ROUTES)
    (root / "vllm-logging.json").write_text(json.dumps(_vllm_logging(root / "vllms-own.jsonl")))
    _make_site(root / "site")
    env = {
        **environment(root / "spool"),
        "PYTHONPATH": f"{ROOT}:{root / 'site'}",
        "SKYRL_LIB": _script("skyrl-env"),
        "SPEAKERS_LEDGER": str(root / "ledger.jsonl"),
        "SKYRL_OTEL_CONFIG": str(root / "settings.toml"),
        "SKYRL_OTEL_LOG_DIR": str(root / "logs"),
        "SKYRL_OTEL_DRAIN_S": "60",
        "SKYRL_OTEL_RAISE": "",
        "VLLM_LOGGING_CONFIG_PATH": str(root / "vllm-logging.json"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "RAY_TMPDIR": str(root / "ray"),
        "RAY_AUTH_MODE": "disabled",
    }
    program = str(ROOT / "tests" / "stack" / "programs" / "vllm_job.py")
    command = [sys.executable, "-m", "skyrl_otel", "run", "--", _script("vllm-env"), program, str(root / "model")]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600, cwd=root)
    terminal = done.stdout.decode(errors="replace")
    print(terminal[-6000:])
    keep("vllm-job", output_below(root))
    assert done.returncode == 0, terminal[-3000:]
    return Job(
        records=list(_stored(next((root / "logs").glob("*.db")))),
        files={path.name: _records_of(path) for path in (root / "logs").glob("*.log")},
        ledger=[json.loads(line) for line in (root / "ledger.jsonl").read_text().splitlines()],
        vllms_own=[json.loads(line) for line in (root / "vllms-own.jsonl").read_text().splitlines()],
    )


def _vllm_logging(own: Path) -> dict[str, Any]:
    """vLLM's own configuration (`vllm/logger.py`), and a file beside its console."""
    console = {
        "()": "vllm.logging_utils.NewLineFormatter",
        "datefmt": "%m-%d %H:%M:%S",
        "format": "(%(vllm_process_name)s pid=%(process)d) %(levelname)s %(asctime)s "
        "[%(fileinfo)s:%(lineno)d] %(message)s",
    }
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"vllm": console, "json": {"()": f"{SPEAKER}.AsJson"}},
        "handlers": {
            "vllm": {
                "class": "logging.StreamHandler",
                "formatter": "vllm",
                "level": "INFO",
                "stream": "ext://sys.stdout",
            },
            "own": {"class": "logging.FileHandler", "formatter": "json", "level": "INFO", "filename": str(own)},
        },
        "loggers": {"vllm": {"handlers": ["vllm", "own"], "level": "INFO", "propagate": False}},
    }


def _make_site(site: Path) -> None:
    # SkyRL's folder last: numpy, torch and the like are the engine's own.
    (site / "sitecustomize.py").write_text("import os, sys\nsys.path.append(os.environ['SKYRL_LIB'])\n")
    plugin = site / "speaker-1.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: speaker\nVersion: 1\n")
    (plugin / "entry_points.txt").write_text(f"[vllm.general_plugins]\nspeaker = {SPEAKER}:plugin\n")


def _stored(store: Path) -> Iterator[Stored]:
    columns = ", ".join("scopes.name" if name == "scope" else f"records.{name}" for name in Row._fields)
    with sqlite3.connect(store) as db:
        query = (
            f"SELECT {columns}, resources.attributes FROM records"
            " JOIN scopes ON scopes.id = scope JOIN resources ON resources.id = resource"
        )
        for *values, resource in db.execute(query):
            yield Stored(Row(*values), read_resource(json.loads(resource)))


def _records_of(path: Path) -> list[str]:
    """A text file's records: further lines of one are indented."""
    return path.read_text().rstrip("\n").replace("\n    ", "\0").split("\n") if path.stat().st_size else []


def test_each_token_is_in_the_file_its_producer_belongs_to_and_nowhere_else(job: Job) -> None:
    told: dict[str, Counter[str]] = {name: Counter() for name in FILES}
    by_token = {said["token"]: said for said in job.ledger}
    for said in job.ledger:
        told[said["file"]][said["token"]] += 1
    found = {name: Counter(TOKEN.findall("\n".join(job.files[name]))) for name in FILES}
    for name in FILES:
        wrong = [by_token.get(token, token) for token in (found[name] - told[name]).elements()]
        missing = [by_token[token] for token in (told[name] - found[name]).elements()]
        assert (wrong, missing) == ([], []), name
    producers = {said["producer"] for said in job.ledger}
    children = [name for name in producers if "EngineCore" in name or "Worker" in name or "extension" in name]
    assert len(children) >= 2, f"nobody spoke in the engine's children: {producers}"


def test_each_file_is_the_multiset_of_the_records_that_belong_there(job: Job) -> None:
    """Not only what has a token. Told by who spoke, in the ledger; by logger for records; by the child's prefix."""
    engines = job.pids("engine") | job.pids("server") | job.pids("plugin") | job.pids("worker extension")
    skyrls = job.pids("policy") | job.pids("entrypoint")
    belongs: dict[str, Counter[str]] = {name: Counter() for name in FILES}
    for record in job.records:
        scope = record.row.scope
        if scope.split(".")[0] in ("vllm", "skyrl", "harbor", "examples"):
            name = "vllm.log" if scope.startswith("vllm") else "skyrl.log"
        elif record.row.stream is None and not scope.startswith("skyrl_otel"):
            # Of a logger that no rule names; then it may be the process that one names.
            name = "vllm.log" if record.child.startswith("EngineCore") else "rest.log"
        else:
            pids = {record.pid, record.resource.pid}
            name = "vllm.log" if pids & engines else "skyrl.log" if pids & skyrls else "rest.log"
        belongs[name][record.text.replace("\n    ", "\0")] += 1
    for name in FILES:
        found = Counter(job.files[name])
        assert (list((found - belongs[name]).elements()), list((belongs[name] - found).elements())) == ([], []), name
    for channel in ("infra", "progress"):
        assert not any(lines for name, lines in job.files.items() if name.startswith(channel))


def test_vllms_own_log_is_in_the_store_once_with_its_loggers(job: Job) -> None:
    """What vLLM wrote into a file of its own, against the records of Ray's processes and of the engine's: logger, level,
    message, as multisets."""
    own = Counter((said["pid"], said["logger"], said["level"], said["message"]) for said in job.vllms_own)
    stored = Counter(
        (record.resource.pid, record.row.scope, record.row.severity_text, str(record.row.body))
        for record in job.records
        if record.row.stream is None and record.row.scope.split(".")[0] == "vllm"
    )
    assert own - stored == Counter()
    # More is there only from before vLLM opened its file: it logs while it is imported, and configures its logging later.
    opened = {said["pid"]: said["time_unix_nano"] for said in reversed(job.vllms_own)}
    since = Counter(
        (record.resource.pid, record.row.scope, record.row.severity_text, str(record.row.body))
        for record in job.records
        if record.row.stream is None
        and record.row.scope.split(".")[0] == "vllm"
        and record.row.time >= opened.get(record.resource.pid or 0, math.inf) - 1000  # what a float of seconds rounds
    )
    assert since == own
    assert (stored - own).keys() & own.keys() == set(), "twice"
    vllms = [record for record in own.elements() if not TOKEN.match(record[3])]
    assert len(vllms) >= 10 and len({logger for _, logger, _, _ in vllms}) >= 5, vllms


def test_vllms_children_say_by_whom_and_for_whom_and_are_not_echoed(job: Job) -> None:
    """EngineCore and its workers are spawned, without Ray's hook: `capture/children.py`."""
    theirs = [record for record in job.records if record.row.stream is None and record.child]
    pids = {record.resource.pid for record in theirs}
    assert job.pids("plugin in EngineCore") & pids and job.pids("worker extension") & pids
    assert {"EngineCore", "VllmWorker"} <= {re.split(r"[_\d-]", record.child)[0] for record in theirs}
    assert {record.resource.actor_class for record in theirs} <= {
        record.resource.actor_class for record in job.records if not record.child
    }
    # Their console's prefix, which only text would still have.
    assert not [record.text for record in job.records if record.row.stream and record.attributes.get("skyrl.child")]


def test_skyrls_and_harbors_records_have_their_loggers_and_no_echo(job: Job) -> None:
    logged = [said for said in job.ledger if said["how"].startswith(("log:", "loguru:"))]
    expected = Counter((said["token"], said["how"].partition(":")[2]) for said in logged)
    found = Counter(
        (match[0], record.row.scope)
        for record in job.records
        if (match := TOKEN.search(str(record.row.body))) and record.row.stream is None
    )
    assert expected - found == Counter(), "not recorded, or by another logger's name"
    assert found.keys() <= {(said["token"], said["how"].partition(":")[2]) for said in logged}
    assert set(found.values()) == {1}
