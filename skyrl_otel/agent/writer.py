"""One writer as the agent sees it: its files, who it is, its journal and checkpoint, and how it ended."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skyrl_otel.agent import ending, otlp
from skyrl_otel.agent.framefile import FrameFile, Note
from skyrl_otel.agent.identify import event_attributes, resource_attributes
from skyrl_otel.agent.moments import Moments
from skyrl_otel.agent.redact import Redactor
from skyrl_otel.agent.tail import Tail
from skyrl_otel.agent.textfile import TextFile
from skyrl_otel.spool import identity, locks
from skyrl_otel.spool.checkpoint import Checkpoint
from skyrl_otel.spool.decisions import Decision, Journal
from skyrl_otel.spool.layout import read_file
from skyrl_otel.spool.writer import FIRST_SEGMENT

EVENT_SCOPE = otlp.scope("skyrl_otel.agent")

_ACTOR_WAIT_NS = 300_000_000
_RANK_WAIT_NS = 2_000_000_000
_EXIT_STATUS_WAIT_NS = 500_000_000
_JOURNAL_BYTES = 1 << 20
_INFO, _WARN, _ERROR = (9, "INFO"), (13, "WARN"), (17, "ERROR")


def _awaited(facts: Mapping[str, Any]) -> str:
    """What the lines of a writer with these facts still wait for: "actor", "rank" or ""."""
    awaits = facts.get("awaits", "")
    if (awaits == "rank" and "rank" in facts) or (awaits == "actor" and "actor_id" in facts):
        return ""
    return str(awaits)


class Writer:
    """`files` maps "out" and "err" to what is read of them; `events` are own records (loss, end, identity) not yet sent."""

    def __init__(
        self,
        run_id: str,
        writer_id: str,
        folder: Path,
        moments: Moments | None = None,
        redactor: Redactor | None = None,
    ) -> None:
        """Raises OSError or ValueError for a folder that cannot be read as a writer's."""
        self.writer_id = writer_id
        self._redactor = redactor or Redactor()
        self.folder = folder
        self.files: dict[str, Tail] = {}
        self.events: list[Decision] = []
        self.pidfd: int | None = None
        self.lost_bytes = 0
        self._run_id = run_id
        self._moments = moments or Moments()
        self._identity_path = str(folder / "identity")
        self._lock_path = folder / ("out" if (folder / "out").exists() else FIRST_SEGMENT)
        self._lines: list[identity.IdentityLine] = []
        self._identity_size = -1
        self._identity_since = 0
        self._facts: dict[str, Any] = {}
        self._resources: dict[int, bytes] = {}
        self._journal = Journal.open(folder / "decisions")
        self._journal_kept = 0
        self._events_unacked: list[Decision] = []
        self._once: list[Decision] = []  # the end and identity events, so that a later agent does not decide them again
        self._counted: set[int] = set()  # identity lines whose lost records are counted
        self._ended = self._told = self._restored = False
        self._ended_at = 0
        self._oom_kills = ending.oom_kills()
        try:
            self._restore()
        except BaseException:
            self.close()
            raise

    # -- recovery ------------------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        try:
            checkpoint = Checkpoint.read(self.folder / "checkpoint")
        except (ValueError, KeyError, TypeError):
            checkpoint = Checkpoint()
        decisions = self._journal.decisions
        for decision in decisions:
            if decision.kind in ("loss", "end", "event"):
                if decision.kind == "loss" and "of" in decision.value:
                    self._counted.add(decision.value["of"])
                    self._once.append(decision)
                if decision.kind == "loss":
                    self.lost_bytes += decision.value["bytes"]
                self._ended = self._ended or decision.kind == "end"
                self._told = self._told or decision.kind == "event"
                if decision.kind != "loss":
                    self._once.append(decision)
                self._moments.taken(decision.value["time"])
                if decision.seq >= checkpoint.decisions:
                    self.events.append(decision)
        self.read_identity(time.time_ns())
        for name, file in self.files.items():
            file.restore(
                checkpoint.files.get(name),
                [decision for decision in decisions if decision.file == name],
            )
            known = file.identity
            file.held = known is None and self._awaits() != ""
            if known is not None:
                self._assign(file, [line for line in self._lines if line.seq > known])
            elif not file.held:
                self._release(file)
        self._restored = True
        self._journal.decisions = []
        if decisions:
            self._journal.flush()
            self.write_checkpoint()

    # -- identity ------------------------------------------------------------------------------------------------------

    @property
    def _seq(self) -> int:
        return self._lines[-1].seq if self._lines else -1

    @property
    def facts(self) -> Mapping[str, Any]:
        """The identity in force now."""
        return self._facts

    def _awaits(self) -> str:
        return _awaited(self._facts)

    def _release(self, file: Tail) -> None:
        """Lines so far belong to the identity that ended the waiting; later identities hold from their sizes on."""
        settled = len(self._lines) - 1
        for index, line in enumerate(self._lines):
            if not _awaited(identity.in_force(self._lines, line.seq)):
                settled = index
                break
        file.release(self._lines[settled].seq if self._lines else -1)
        self._assign(file, self._lines[settled + 1 :])

    def _assign(self, file: Tail, lines: list[identity.IdentityLine]) -> None:
        for line in lines:
            generation, offset = line.sizes.get(file.name, (0, file.sent.offset))
            file.assign(line.seq, offset if generation <= file.generation else file.sent.offset)

    def read_identity(self, now: int) -> None:
        """Read what the writer says of itself; new lines are assigned to its files. Raises OSError."""
        size = os.stat(self._identity_path).st_size
        if size == self._identity_size:
            return
        lines = identity.parse(read_file(Path(self._identity_path)))
        self._identity_size = size
        fresh = lines[len(self._lines) :]
        self._lines = lines
        self._facts = identity.in_force(lines, self._seq)
        self._count_lost(lines)
        if any("awaits" in line.changes for line in fresh):
            self._identity_since = now
        for name in self._names():
            if name not in self.files:
                self._add_file(name)
            file = self.files[name]
            if file.held:
                if self._restored and not self._awaits():
                    self._release(file)
            else:
                self._assign(file, fresh)
        if self.pidfd is None and not self._ended and isinstance(self._facts.get("pid"), int):
            self._watch_process(self._facts["pid"])

    def _count_lost(self, lines: list[identity.IdentityLine]) -> None:
        """Records that the process could not write, and says so: a loss for each line that tells of more."""
        before = 0
        for line in lines:
            lost = line.changes.get("lost")
            if not isinstance(lost, dict):
                continue
            size, count = int(lost.get("bytes", 0)), int(lost.get("records", 0))
            if line.seq not in self._counted and size > before:
                self._counted.add(line.seq)
                why = f"the process could not write {count} records so far ({lost.get('why')})"
                value = {"bytes": size - before, "why": why, "skip": False, "of": line.seq}
                self._once.append(self.decide("", 0, 0, "loss", value))
            before = size

    def _watch_process(self, pid: int) -> None:
        self.pidfd = ending.open_pidfd(pid)
        if self.pidfd is not None and not self.is_alive():
            # Gone before we looked: the number may be another process's by now.
            os.close(self.pidfd)
            self.pidfd = None

    def _names(self) -> list[str]:
        follow = self._facts.get("follow")
        if isinstance(follow, dict):
            return [*(name for name in ("out", "err") if name in follow), "records"]
        return [*(name for name in ("out", "err") if name in self.files or (self.folder / name).exists()), "records"]

    def _add_file(self, name: str) -> None:
        follow = self._facts.get("follow")
        file: Tail
        if name == "records":
            file = FrameFile(self.writer_id, self.folder, self.decide, self._redactor, self._take_note)
        elif isinstance(follow, dict):
            fields = follow[name]
            inode = (int(fields["dev"]), int(fields["ino"])) if "ino" in fields else None
            file = TextFile(
                self.writer_id,
                name,
                Path(fields["path"]),
                self.decide,
                followed=True,
                first_offset=int(fields.get("offset", 0)),
                skip_markers=bool(fields.get("skip_markers")),
                inode=inode,
                moments=self._moments,
                has_echoes=bool(fields.get("echoes")),
                redactor=self._redactor,
            )
        else:
            path = self.folder / name
            file = TextFile(self.writer_id, name, path, self.decide, moments=self._moments, redactor=self._redactor)
        file.held = True
        self.files[name] = file

    def _take_note(self, note: Note) -> None:
        for file in self.files.values():  # stdout and stderr may be one file, which is followed under one name
            if isinstance(file, TextFile):
                file.note_echo(note.inode, note.start, note.end)

    def _release_held(self, now: int) -> None:
        awaits = self._awaits()
        for file in self.files.values():
            if not file.held or not file.decided.marks:
                continue
            if awaits == "actor":
                waited = now - file.decided.marks[0].value >= _ACTOR_WAIT_NS
            elif awaits == "rank":
                waited = now - self._identity_since >= _RANK_WAIT_NS
            else:
                waited = True
            if waited or self._ended:
                self._release(file)

    # -- looking -------------------------------------------------------------------------------------------------------

    def paths(self) -> list[str]:
        """The files whose change is news of this writer."""
        return [self._identity_path, *(str(file.path) for file in self.files.values())]

    def observe(self, now: int) -> bool:
        """Look at everything once; True if something is new. Raises OSError for a folder that is gone or unreadable."""
        before = self._identity_size
        self.read_identity(now)
        fresh = before != self._identity_size
        for file in self.files.values():
            fresh = file.observe(now) or fresh
        self._release_held(now)
        for file in self.files.values():
            file.cut_partial(now, final=self._ended and not self._facts.get("until_agent"))
        if not self._told and self._lines and not any(file.held for file in self.files.values()):
            self._tell_identity(now)
        if not self._ended:
            self._look_for_end(now)
        return fresh

    def _tell_identity(self, now: int) -> None:
        self._told = True
        if not self._facts.get("silent_end"):
            self.decide("", 0, 0, "event", {"name": "skyrl.identity"}, now)

    def _look_for_end(self, now: int) -> None:
        goodbye = self._facts.get("goodbye")
        if self.pidfd is not None:
            if not ending.has_ended(self.pidfd):
                return
        elif self.is_alive():
            return
        self._ended_at = self._ended_at or now
        known = ending.exit_of(self.pidfd) if self.pidfd is not None else ending.Exit()
        if known.code is None and known.signal is None:
            if isinstance(goodbye, dict) and isinstance(goodbye.get("signal"), int):
                known = ending.Exit(signal=goodbye["signal"])
            elif isinstance(goodbye, dict) and isinstance(goodbye.get("code"), int):
                known = ending.Exit(code=goodbye["code"])
            elif self.pidfd is not None and now - self._ended_at < _EXIT_STATUS_WAIT_NS:
                return  # its parent has not reaped it yet
        for file in self.files.values():
            if file.is_gone():
                file.count_gone()
            else:
                file.observe(now, final=True)
            if file.held:
                self._release(file)
        last = max((file.last_line() for file in self.files.values()), default=(0, ""))[1]
        self._ended = True  # not before all that may fail: it is tried again then
        if self._facts.get("silent_end"):
            return
        value = {
            "name": "skyrl.process.end",
            "code": known.code,
            "signal": known.signal,
            "clean": isinstance(goodbye, dict) and "signal" not in goodbye,
            "fine": self._ended_well(known, goodbye),
            # Ray's workers exit with 1, without a word, when their raylet or job is gone.
            "by_ray": known.code == 1 and "worker_id" in self._facts,
            "how": known.describe(),
            "oom": ending.oom_kills() > self._oom_kills,
            "last": last,
        }
        self.decide("", 0, 0, "end", value, now)  # behind the last lines, whose moments are taken

    def _ended_well(self, known: ending.Exit, goodbye: Any) -> bool:
        if not isinstance(goodbye, dict) or goodbye.get("code") or "signal" in goodbye:
            return known.code == 0
        # Ray ends its workers by SIGTERM when a job is over; their exit handlers run and they exit with code 1.
        return known.signal is None and (not known.code or "worker_id" in self._facts)

    def is_alive(self) -> bool:
        """Whether somebody still holds one of the writer's locks."""
        if locks.is_held(self._lock_path):  # what the living hold most often, and cheap to ask
            return True
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return False
        except OSError:  # out of descriptors: nobody is gone for that
            return True
        return any(locks.is_held(self.folder / n) for n in names if n in ("out", "err") or n.startswith("records."))

    @property
    def ended(self) -> bool:
        return self._ended

    # -- journal and events --------------------------------------------------------------------------------------------

    def decide(
        self, file: str, generation: int, offset: int, kind: Any, value: Any, now: int | None = None
    ) -> Decision:
        """Journal a decision; those that are records of their own become events."""
        if kind in ("loss", "end", "event"):
            value = {**value, "time": self._moments.take(now or time.time_ns()), "identity": self._seq}
        decision = self._journal.add(file, generation, offset, kind, value)
        if kind in ("loss", "end", "event"):
            self.events.append(decision)
            if kind == "loss":
                self.lost_bytes += value["bytes"]
            else:
                self._once.append(decision)
        return decision

    def flush(self) -> None:
        """Decisions to disk; nothing built on them may leave before. Raises OSError."""
        self._journal.flush()

    def take_events(self, budget: int) -> list[tuple[int, bytes]]:
        """(identity seq, record) of the oldest events not under way, at least one, about `budget` bytes of them; they are
        under way now."""
        records: list[tuple[int, bytes]] = []
        size = 0
        for decision in self.events:
            records.append((decision.value["identity"], self._redactor.field(self._event_record(decision))))
            size += len(records[-1][1])
            if size >= budget:
                break
        self._events_unacked += self.events[: len(records)]
        self.events = self.events[len(records) :]
        return records

    def _event_record(self, decision: Decision) -> bytes:
        value = decision.value
        uid = {"log.record.uid": f"{self.writer_id}/decisions/0/{decision.seq}-{decision.seq + 1}"}
        if decision.kind == "loss":
            stream = {"out": "stdout", "err": "stderr"}.get(decision.file, "records")
            attributes: dict[str, otlp.Value] = {
                **({} if stream == "records" else {"log.iostream": stream}),
                "skyrl.lost.bytes": value["bytes"],
                "skyrl.lost.reason": value["why"],
            }
            body = f"{value['bytes']} bytes of {stream} were lost: {value['why']}"
            return otlp.event_record(value["time"], "skyrl.loss", _WARN, body, {**attributes, **uid})
        facts = identity.in_force(self._lines, value["identity"])
        if decision.kind == "event":
            body = f"{facts.get('role') or 'process'} {facts.get('pid', '')} is recorded"
            return otlp.event_record(value["time"], "skyrl.identity", _INFO, body, {**event_attributes(facts), **uid})
        attributes = {"skyrl.exit.clean": value["clean"], "skyrl.last_line": value["last"]}
        if value["code"] is not None:
            attributes["process.exit.code"] = value["code"]
        if value["signal"] is not None:
            attributes["skyrl.exit.signal"] = value["signal"]
        if value["oom"]:
            attributes["skyrl.oom_kill"] = True
        body = f"process {facts.get('pid', '')} {value['how']}"
        severity = _INFO if value["fine"] else _WARN if value["by_ray"] else _ERROR
        return otlp.event_record(value["time"], "skyrl.process.end", severity, body, {**attributes, **uid})

    def resource(self, identity_seq: int) -> bytes:
        """The encoded resource under an identity."""
        if identity_seq not in self._resources:
            facts = {"host": os.uname().nodename, **identity.in_force(self._lines, identity_seq)}
            encoded = otlp.resource(resource_attributes(facts, self._run_id, self.writer_id))
            self._resources[identity_seq] = self._redactor.resource(encoded)
        return self._resources[identity_seq]

    # -- after the answer ----------------------------------------------------------------------------------------------

    @property
    def events_low_water(self) -> int:
        waiting = self._events_unacked + self.events
        return waiting[0].seq if waiting else self._journal.next_seq

    def accept_events(self, count: int) -> None:
        """The oldest `count` events under way are acknowledged."""
        del self._events_unacked[:count]

    def undo_events(self, count: int) -> None:
        """The newest `count` events taken were not sent."""
        keep = len(self._events_unacked) - count
        self.events = self._events_unacked[keep:] + self.events
        del self._events_unacked[keep:]

    def write_checkpoint(self) -> None:
        """Put the acknowledged positions on disk, then give the bytes below back. Raises OSError."""
        self.flush()
        Checkpoint({name: file.acked for name, file in self.files.items()}, self.events_low_water).write(
            self.folder / "checkpoint"
        )
        for file in self.files.values():
            file.give_back()
        self.bound_journal()

    def bound_journal(self) -> None:
        """Write a journal that grew long anew, with what is still needed. Raises OSError; then the old one stays."""
        if self._journal.size > max(_JOURNAL_BYTES, 2 * self._journal_kept):
            self._rewrite_journal()
            self._journal_kept = self._journal.size

    def _rewrite_journal(self) -> None:
        kept = [decision for file in self.files.values() for decision in file.kept_decisions()]
        kept += self._events_unacked + self.events + self._once
        # Seq numbers are uids: the next one must never fall back below one that was used.
        kept.append(Decision(self._journal.next_seq - 1, "", 0, 0, "mark", 0))
        unique = {decision.seq: decision for decision in reversed(kept)}
        self._journal.rewrite([unique[seq] for seq in sorted(unique)])

    # -- totals --------------------------------------------------------------------------------------------------------

    @property
    def backlog_bytes(self) -> int:
        return sum(file.backlog for file in self.files.values())

    @property
    def has_work(self) -> bool:
        """Whether something could be put into a request now."""
        return bool(self.events) or any(file.ready for file in self.files.values())

    @property
    def is_drained(self) -> bool:
        """Nothing is left to deliver as of the last look, but partial lines younger than a second."""
        if self.events or self._events_unacked:
            return False
        if not self._ended and self.pidfd is not None and ending.has_ended(self.pidfd):
            return False
        return all(file.is_drained for file in self.files.values())

    @property
    def is_delivered(self) -> bool:
        if self.events or self._events_unacked:
            return False
        return all(file.unacked == 0 for file in self.files.values())

    def close(self) -> None:
        self._journal.close()
        for file in self.files.values():
            file.close()
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None
