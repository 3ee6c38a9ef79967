"""Is anything wrong: settings, receiver, spool, agents, losses. Each check gives findings; `skyrl-otel doctor` prints them."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from skyrl_otel.agent.connect import connect
from skyrl_otel.config import Config, describe
from skyrl_otel.query.backlog import measure
from skyrl_otel.query.explain import advice
from skyrl_otel.query.summary import RunSummary, summarize
from skyrl_otel.spool import identity, locks, token
from skyrl_otel.spool.layout import (
    RunDir,
    SpoolRefused,
    check_disk,
    ensure_private_dir,
    existing_runs,
    read_file,
    store_path,
)
from skyrl_otel.spool.token import Shipping

Level = Literal["ok", "note", "wrong"]

_STALE_S = 15.0  # an agent writes its status every 2 s
_ANSWER_S = 5.0
_LITTLE_SPACE_BYTES = 1 << 30
_SHOWN_LOSSES = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's report. `area` is what it is about."""

    level: Level
    area: str
    text: str


def examine(environ: Mapping[str, str] | None = None) -> Iterator[Finding]:
    """All checks, as they finish. Sends one empty request to each receiver; changes nothing else."""
    config = Config.from_env(environ)
    yield from check_config(config, environ)
    yield from check_endpoint(config)
    yield from check_spool(config)
    runs = existing_runs(config.spool_root)
    for number, run in enumerate(runs):
        yield from check_run(run, is_newest=number == 0)


def check_config(config: Config, environ: Mapping[str, str] | None) -> Iterator[Finding]:
    for problem in config.problems:
        yield Finding("wrong", "config", problem)
    changed = [setting for setting in describe(environ) if setting.source != "default" and not setting.problem]
    for setting in changed:
        yield Finding("ok", "config", f"{setting.source}={setting.value}")
    if config.disabled:
        yield Finding("note", "config", "OTEL_SDK_DISABLED is set: nothing is recorded")
    if not config.problems and not changed:
        yield Finding("ok", "config", "all settings at their defaults")


def check_endpoint(config: Config) -> Iterator[Finding]:
    """The user's own endpoint; the embedded collectors are looked at with their runs."""
    shipping = token.from_config(config)
    if shipping is None:
        yield Finding("ok", "endpoint", f"none set: the embedded collector writes to {config.log_dir}")
        yield from _check_log_dir(config.log_dir)
        return
    yield probe(shipping, "endpoint")


def probe(shipping: Shipping, area: str) -> Finding:
    """Send an empty, valid request: it tells address, path, TLS and token at once and stores nothing."""
    began = time.monotonic()
    client = connect(shipping._replace(timeout_s=min(shipping.timeout_s, _ANSWER_S)))
    try:
        answer = client.post(b"")
    finally:
        client.close()
    host = urlsplit(shipping.endpoint).netloc.rpartition("@")[2]
    if answer.verdict == "accepted":
        return Finding("ok", area, f"{host} takes records, answered in {(time.monotonic() - began) * 1000:.0f} ms")
    return Finding("wrong", area, answer.reason + advice(answer.reason))


def check_spool(config: Config) -> Iterator[Finding]:
    root = config.spool_root
    if not root.exists():
        yield Finding("ok", "spool", f"{root} is made by the first run")
        return
    try:
        ensure_private_dir(root)
        check_disk(root, allow_tmpfs=config.allow_tmpfs)
    except SpoolRefused as error:
        yield Finding("wrong", "spool", str(error))
        return
    free = _free_bytes(root)
    text = f"{root} on {file_system(root)}, {_size(free)} free"
    if free < _LITTLE_SPACE_BYTES:
        yield Finding(
            "wrong", "spool", f"{text}: too little; free space or set SKYRL_OTEL_SPOOL_DIR to another local disk"
        )
    else:
        yield Finding("ok", "spool", text)


def check_run(run: RunDir, *, is_newest: bool) -> Iterator[Finding]:
    """One run on this node: what it still holds, who delivers it, what was lost."""
    area = f"run {run.run_id}"
    backlog = measure(run)
    has_agent = locks.is_held(run.agent_lock)
    status = _status(run) if has_agent else None
    has_collector = locks.is_held(run.store / "lock")
    holds = f"{_size(backlog.size_bytes)} not delivered by {backlog.holding} of {backlog.writers} writers"
    if has_agent:
        yield from _check_agent(area, status, f"{backlog.alive} writers alive, {holds}")
    elif backlog.alive:
        yield Finding("wrong", area, f"{backlog.alive} writers alive and no agent; {holds}, kept in {run.path}")
    elif backlog.size_bytes:
        yield Finding("wrong", area, f"no agent; {holds}, kept in {run.path}")
    elif is_newest:
        yield Finding("ok", area, "ended, all delivered")
    yield from _check_processes(run, area)
    if has_collector or has_agent:
        yield from _check_receiver(run, area, has_collector)
    if is_newest or has_agent or has_collector:
        yield from _check_store(run, area)


def _check_agent(area: str, status: dict[str, Any] | None, state: str) -> Iterator[Finding]:
    if status is None:
        yield Finding("wrong", area, f"the agent has written no status; {state}")
        return
    age_s = (time.time_ns() - int(status.get("time_unix_nano") or 0)) / 1e9
    pid = status.get("pid")
    if age_s > _STALE_S:
        yield Finding("wrong", area, f"agent {pid} has said nothing for {age_s:.0f} s; {state}")
    elif status.get("error"):
        error = str(status["error"])
        yield Finding("wrong", area, f"agent {pid}: {error}{advice(error)}; {state}")
    else:
        counters = f"{status.get('sent_records', 0)} records sent, {status.get('restarts', 0)} restarts"
        yield Finding("ok", area, f"agent {pid}: {state}; {counters}")
    redacted = status.get("redacted")
    if isinstance(redacted, dict) and redacted:
        counted = ", ".join(f"{count} {rule}" for rule, count in sorted(redacted.items()))
        yield Finding("note", area, f"agent {pid}: secrets masked before sending: {counted}")
    for note in status.get("notes") or ():
        yield Finding("note", area, str(note))
    for name, meaning in (("lost_bytes", "bytes lost"), ("rejected_records", "records rejected by the receiver")):
        if status.get(name):
            yield Finding("wrong", area, f"agent {pid}: {status[name]} {meaning}")


def _check_processes(run: RunDir, area: str) -> Iterator[Finding]:
    """What our code in the user's processes could not do, as their identity tells."""
    for _, folder in run.writers():
        try:
            lines = identity.parse(read_file(folder / "identity"))
        except OSError:
            continue
        facts = identity.in_force(lines, lines[-1].seq) if lines else {}
        name = f"{facts.get('role') or 'process'} {facts.get('pid', '?')}"
        lost = facts.get("lost")
        if isinstance(lost, dict):
            text = f"could not record {lost.get('records')} records, {_size(int(lost.get('bytes') or 0))}: {lost.get('why')}"
            yield Finding("wrong", area, f"{name} {text}")
        errors = facts.get("errors")
        if isinstance(errors, dict):
            counted = ", ".join(f"{place} {count}" for place, count in sorted(errors.items()))
            yield Finding("note", area, f"{name}: errors of our own, kept from the program: {counted}")


def _check_receiver(run: RunDir, area: str, has_collector: bool) -> Iterator[Finding]:
    shipping = token.read(run)
    if shipping is None:
        yield Finding("note", area, "no token yet: the agent keeps all and waits for it")
    elif has_collector or shipping.control is None or not shipping.endpoint.startswith(shipping.control.url[:12]):
        yield probe(shipping, area)


def _check_store(run: RunDir, area: str) -> Iterator[Finding]:
    path = store_path(run)
    try:
        summary = summarize(path)
    except FileNotFoundError:
        return
    except sqlite3.Error as error:
        yield Finding("wrong", area, f"the store {path} cannot be read: {error}")
        return
    yield Finding(
        "ok",
        area,
        f"{summary.records} records of {len(summary.writers)} writers, {_size(summary.size_bytes)},"
        f" {summary.repeats_dropped} repeats dropped",
    )
    yield from _losses(area, summary)


def _losses(area: str, summary: RunSummary) -> Iterator[Finding]:
    for loss in summary.losses[:_SHOWN_LOSSES]:
        text = f"lost {_size(loss.size_bytes)} of {loss.stream or 'records'} of {loss.name} on {loss.node or '?'}"
        yield Finding("wrong", area, f"{text}: {loss.reason}")
    more = summary.losses[_SHOWN_LOSSES:]
    if more:
        yield Finding("wrong", area, f"{len(more)} more losses, {_size(sum(loss.size_bytes for loss in more))}")


def _check_log_dir(log_dir: Path) -> Iterator[Finding]:
    existing = next(folder for folder in (log_dir, *log_dir.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield Finding(
            "wrong", "log dir", f"cannot write to {existing}; set SKYRL_OTEL_LOG_DIR to a folder that is writable"
        )
        return
    free = _free_bytes(existing)
    level: Level = "wrong" if free < _LITTLE_SPACE_BYTES // 4 else "ok"
    yield Finding(level, "log dir", f"{log_dir} on {file_system(existing)}, {_size(free)} free")


def _status(run: RunDir) -> dict[str, Any] | None:
    try:
        status = json.loads(read_file(run.status))
    except (OSError, ValueError):
        return None
    return status if isinstance(status, dict) else None


def file_system(path: Path) -> str:
    """The name of the file system that holds `path`, from /proc/self/mountinfo (proc(5)); "?" if that is not told."""
    try:
        device = os.stat(path).st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if line.split(" ", 3)[2] == wanted:
                return line.partition(" - ")[2].split(" ")[0]
    except (OSError, IndexError):
        pass
    return "?"


def _free_bytes(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def _size(size_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"
