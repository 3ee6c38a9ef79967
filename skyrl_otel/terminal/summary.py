"""The last words of a run, on stderr: what was recorded, where it is, what went wrong, how to read on.

On a terminal a small block; elsewhere (a CI log, a file) one line, and one more for each thing that went wrong.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from skyrl_otel.collector.text import visible
from skyrl_otel.query.summary import ProcessEnd, RunSummary, Writer
from skyrl_otel.terminal.drain import Node, Outcome

_ENDS_SHOWN = 5
_GROUPS_SHOWN = 12
_NODES_SHOWN = 3
_LAST_WORDS = 160
# How long a cluster takes to shut down, if nobody has said when that began.
_SHUTDOWN_NS = 5_000_000_000


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known at the end.

    Attributes:
        endpoint: the user's own collector, or None.
        spool: this node's folder of the run.
        store: what the embedded collector has, if there is one.
        driver_pid: the command; how it ended is for its exit code to tell.
        driver_failed: whether that was with anything but 0.
        over_unix_nano: when the command ended.
        shutdown_unix_nano: when it began to end its cluster, if that is known.
        agent_said: the last line of this node's agent's log.
        unrecorded_bytes: printed, but not taken by the spool.
        remarks: sentences about what else did not work.
    """

    run_id: str
    endpoint: str | None
    spool: Path
    store: RunSummary | None
    outcome: Outcome
    driver_pid: int
    driver_failed: bool
    over_unix_nano: int
    shutdown_unix_nano: int | None = None
    agent_said: str = ""
    unrecorded_bytes: int = 0
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Style:
    """Escape sequences, or none."""

    bold: str = ""
    dim: str = ""
    red: str = ""
    plain: str = ""


COLOURS = Style("\x1b[1m", "\x1b[2m", "\x1b[31m", "\x1b[0m")
NO_COLOURS = Style()


def block(facts: Facts, style: Style) -> str:
    """For a terminal."""
    lines = [f"{style.bold}skyrl-otel{style.plain}  run {facts.run_id}: {_what(facts)}"]
    if facts.store:
        lines += _table(facts.store.writers, style)
    for complaint in _complaints(facts):
        head, *rest = complaint
        lines += ["", f"  {style.red}✗{style.plain} {head}", *(f"    {style.dim}{line}{style.plain}" for line in rest)]
    if facts.store:
        places = [*sorted((channel, path) for channel, path in facts.store.texts.items()), ("store", facts.store.path)]
        lines += ["", *(f"  {style.dim}{name:<8}{style.plain}  {path}" for name, path in places)]
    lines += ["", *(f"  {style.bold}{command}{style.plain}" for command in _commands(facts))]
    return "\n".join(["", *lines, ""])


def plain(facts: Facts) -> str:
    """For a log."""
    where = ""
    if facts.store:
        where = f" in {facts.store.texts.get('infra', facts.store.path)}"
    commands = _commands(facts)
    lines = [f"run {facts.run_id}: {_what(facts)}{where}" + (f" ({commands[0]})" if commands else "")]
    lines += [": ".join(complaint) for complaint in _complaints(facts)]
    return "".join(f"skyrl-otel: {line}\n" for line in lines)


def size(size_bytes: float) -> str:
    """A size for people: "0 B", "12.3 MB"."""
    for unit in ("B", "KB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def count(number: int, noun: str) -> str:
    """ "1 record", "2 records", "3 processes"."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}{plural}"


def _what(facts: Facts) -> str:
    if facts.store:
        writers = facts.store.writers
        nodes = {writer.node for writer in writers}
        text = f"{count(facts.store.records, 'record')} from {count(_processes(writers), 'process')}"
        text += f" on {count(len(nodes), 'node')}" if len(nodes) > 1 else ""
        return text + (f", {count(facts.store.errors, 'error')}" if facts.store.errors else "")
    if facts.endpoint:
        sent = sum(node.sent_records for node in facts.outcome.nodes)
        parts = urlsplit(facts.endpoint)
        return f"{count(sent, 'record')} delivered to {parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    return "nothing is stored yet"


def _processes(writers: Iterable[Writer]) -> int:
    return len({(writer.node, writer.pid) for writer in writers})


def _table(writers: Sequence[Writer], style: Style) -> list[str]:
    """One row for each component: how many processes, records, errors, and where."""
    groups: dict[str, list[Writer]] = {}
    for writer in writers:
        groups.setdefault(writer.role or writer.actor_class or writer.name, []).append(writer)
    ordered = sorted(groups.items(), key=lambda item: -sum(writer.records for writer in item[1]))
    rows = []
    for name, members in ordered[:_GROUPS_SHOWN]:
        records, errors = sum(w.records for w in members), sum(w.errors for w in members)
        nodes = sorted({w.node or "?" for w in members})
        rows.append(
            (visible(name), count(_processes(members), "process"), count(records, "record"), errors, _some(nodes))
        )
    if not rows:
        return []
    widths = [max(len(str(row[column])) for row in rows) for column in range(3)]
    lines = [""]
    for name, processes, records_text, errors, where in rows:
        line = f"  {name:<{widths[0]}}  {processes:>{widths[1]}}  {records_text:>{widths[2]}}  {style.dim}{where}{style.plain}"
        lines.append(line + (f"  {style.red}{count(errors, 'error')}{style.plain}" if errors else ""))
    if len(ordered) > _GROUPS_SHOWN:
        lines.append(f"  {style.dim}and {len(ordered) - _GROUPS_SHOWN} more{style.plain}")
    return lines


def _complaints(facts: Facts) -> list[tuple[str, ...]]:
    """What went wrong: each a sentence and perhaps further lines."""
    found: list[tuple[str, ...]] = []
    ends = failures(facts)
    found += [_ended(end) for end in ends[:_ENDS_SHOWN]]
    if len(ends) > _ENDS_SHOWN:
        found.append((f"{count(len(ends) - _ENDS_SHOWN, 'more process')} ended abnormally",))
    if facts.store:
        for loss in facts.store.losses[:_ENDS_SHOWN]:
            stream = f" ({loss.stream})" if loss.stream else ""
            found.append(
                (f"{size(loss.size_bytes)} of {visible(loss.name)}{stream} were lost: {visible(loss.reason)}",)
            )
        if len(facts.store.losses) > _ENDS_SHOWN:
            found.append((f"{size(facts.store.lost_bytes)} were lost in all",))
    if facts.unrecorded_bytes:
        found.append(
            (f"{size(facts.unrecorded_bytes)} of what was printed here are not recorded: the spool took no more",)
        )
    found += [_still_holds(node, facts) for node in facts.outcome.late]
    if all(math.isinf(node.age_s) for node in facts.outcome.nodes):
        found.append(
            (
                f"this node's agent has not reported{': ' + visible(facts.agent_said) if facts.agent_said else ''}",
                f"lines are kept in {facts.spool}; to deliver them: {_replay(facts)}",
            )
        )
    rejected = sum(node.rejected_records for node in facts.outcome.nodes)
    if rejected:
        found.append((f"{count(rejected, 'record')} were rejected by the collector",))
    found += [(remark,) for remark in facts.remarks]
    return found


def failures(facts: Facts) -> list[ProcessEnd]:
    """Abnormal ends, the first one first, but for those that are a cluster's way to shut down.

    Ray ends a job's actors by SIGTERM, SIGKILL or exit code 1, whatever they are doing. Where nobody has noted when that
    began, the seconds before the command's end are taken for it, and of a command that failed the first end in them is
    taken for the reason.
    """
    if facts.store is None:
        return []
    ends = sorted(
        (end for end in facts.store.ends if end.failed and not (end.pid == facts.driver_pid and end.role == "driver")),
        key=lambda end: end.time_unix_nano,
    )
    if facts.shutdown_unix_nano is not None:
        return [end for end in ends if end.time_unix_nano < facts.shutdown_unix_nano]
    began = facts.over_unix_nano - _SHUTDOWN_NS
    before = [end for end in ends if end.time_unix_nano < began]
    within = [end for end in ends if began <= end.time_unix_nano < facts.over_unix_nano]
    return before + (within[:1] if facts.driver_failed and not before else [])


def _ended(end: ProcessEnd) -> tuple[str, ...]:
    name = visible(end.actor_name or end.actor_class or end.name)
    about = [end.actor_class] if end.actor_name and end.actor_class else []
    about += [f"rank {end.rank}"] if end.rank is not None else []
    about += [f"actor {end.actor_id[:8]}"] if end.actor_id else []
    about += [f"pid {end.pid}"] if end.pid else []
    about += [f"on {end.node}"] if end.node else []
    if end.signal:
        how = f"was killed by {end.signal}" + (", out of memory" if end.oom_kill else "")
    elif end.exit_code is not None:
        how = f"exited with code {end.exit_code}"
    else:
        how = "ended without a word of why" + (", while memory was short" if end.oom_kill else "")
    head = f"{name} ({visible(', '.join(about))}) {how}" if about else f"{name} {how}"
    if not end.last_line:
        return (head,)
    words = visible(end.last_line).replace("\n", " ")
    return (head, f"last words: {words[:_LAST_WORDS]}{'…' if len(words) > _LAST_WORDS else ''}")


def _still_holds(node: Node, facts: Facts) -> tuple[str, ...]:
    held = size(node.backlog_bytes) if node.backlog_bytes else "its last lines perhaps"
    why = f" ({node.error})" if node.error else ""
    return (
        f"{node.name} still holds {held}{why}",
        f"its agent goes on delivering; by hand, on {node.name}: {_replay(facts)}",
    )


def _replay(facts: Facts) -> str:
    return f"skyrl-otel replay --run {shlex.quote(facts.run_id)}"


def _commands(facts: Facts) -> list[str]:
    if facts.store is None:
        return []
    logs = f"skyrl-otel logs --run {shlex.quote(facts.run_id)}"
    for end in failures(facts):
        who = end.actor_name or end.actor_class
        if who:
            return [f"{logs} --actor {shlex.quote(who)}", logs, "skyrl-otel runs"]
    return [logs, "skyrl-otel runs"]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(visible(name) for name in names[:_NODES_SHOWN])
    return shown + (f" and {len(names) - _NODES_SHOWN} more" if len(names) > _NODES_SHOWN else "")
