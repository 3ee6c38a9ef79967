"""One writer as the agent sees it: its files, who it is, its journal and checkpoint, and how it ended."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skyrl_otel.agent import otlp, ownrecords
from skyrl_otel.agent.ending import Ending
from skyrl_otel.agent.framefile import FrameFile, Note
from skyrl_otel.agent.identify import resource_attributes
from skyrl_otel.agent.identitylog import IdentityLog
from skyrl_otel.agent.moments import Moments
from skyrl_otel.agent.ownrecords import OwnRecords
from skyrl_otel.agent.redact import Redactor
from skyrl_otel.agent.tail import Tail
from skyrl_otel.agent.textfile import TextFile
from skyrl_otel.spool import locks
from skyrl_otel.spool.checkpoint import Checkpoint
from skyrl_otel.spool.decisions import Decision, Journal
from skyrl_otel.spool.identity import IdentityLine
from skyrl_otel.spool.writer import FIRST_SEGMENT

_JOURNAL_BYTES = 1 << 20


class Writer:
    """`files` maps "out", "err" and "records" to what is read of them; `own` are the agent's own records about it.

    `ended`: its process is gone, all that it wrote is seen, and its end is decided.
    """

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
        self.folder = folder
        self.files: dict[str, Tail] = {}
        self.own = OwnRecords(self._encode)
        self.ended = False
        self._told = self._restored = False
        self._run_id = run_id
        self._moments = moments or Moments()
        self._redactor = redactor or Redactor()
        self._lock_path = folder / ("out" if (folder / "out").exists() else FIRST_SEGMENT)
        self._identity = IdentityLog(folder / "identity")
        self._process = Ending()
        self._resources: dict[int, bytes] = {}
        self._journal = Journal.open(folder / "decisions")
        self._journal_kept = 0
        try:
            self._restore()
        except BaseException:
            self.close()
            raise

    def _restore(self) -> None:
        try:
            checkpoint = Checkpoint.read(self.folder / "checkpoint")
        except (ValueError, KeyError, TypeError):
            checkpoint = Checkpoint()
        decisions = self._journal.decisions
        self.own.restore(decisions, checkpoint.decisions)
        self.ended, self._told = self.own.has("end"), self.own.has("event")
        for decision in decisions:
            if decision.kind in ownrecords.KINDS:
                self._moments.taken(decision.value["time"])
        self.read_identity(time.time_ns())
        for name, file in self.files.items():
            file.restore(checkpoint.files.get(name), [decision for decision in decisions if decision.file == name])
            self._identify_restored(file)
        self._restored = True
        self._journal.decisions = []
        if decisions:
            self._journal.flush()
            self.write_checkpoint()

    def _identify_restored(self, file: Tail) -> None:
        known = file.identity
        file.held = known is None and self._identity.awaits != ""
        if known is not None:
            self._assign(file, self._identity.behind(known))
        elif not file.held:
            self._release(file)

    # -- identity ------------------------------------------------------------------------------------------------------

    @property
    def facts(self) -> Mapping[str, Any]:
        """The identity in force now."""
        return self._identity.facts

    def read_identity(self, now: int) -> bool:
        """Read what the writer says of itself; new lines are assigned to its files. True if there are any. Raises OSError."""
        fresh = self._identity.read(now)
        if fresh is None:
            return False
        self._count_unwritten()
        for name in self._names():
            if name not in self.files:
                self._add_file(name)
            file = self.files[name]
            if not file.held:
                self._assign(file, fresh)
            elif self._restored and not self._identity.awaits:
                self._release(file)
        pid = self.facts.get("pid")
        if self.pidfd is None and not self.ended and isinstance(pid, int):
            self._process.watch(pid, self.is_alive)
        return True

    def _count_unwritten(self) -> None:
        for seq, size_bytes, why in self._identity.unwritten():
            if not self.own.has_counted(seq):
                self.decide("", 0, 0, "loss", {"bytes": size_bytes, "why": why, "skip": False, "of": seq})

    def _release(self, file: Tail) -> None:
        """Lines so far belong to the identity that ended the waiting; later identities hold from their sizes on."""
        settled = self._identity.settled_seq
        file.release(settled)
        self._assign(file, self._identity.behind(settled))

    def _assign(self, file: Tail, lines: list[IdentityLine]) -> None:
        for line in lines:
            generation, offset = line.sizes.get(file.name, (0, file.sent.offset))
            file.assign(line.seq, offset if generation <= file.generation else file.sent.offset)

    def _release_held(self, now: int) -> None:
        for file in self.files.values():
            marks = file.decided.marks
            if file.held and marks and (self.ended or self._identity.has_waited(marks[0].value, now)):
                self._release(file)

    def resource(self, identity_seq: int) -> bytes:
        """The encoded resource under an identity."""
        if identity_seq not in self._resources:
            facts = {"host": os.uname().nodename, **self._identity.in_force(identity_seq)}
            encoded = otlp.resource(resource_attributes(facts, self._run_id, self.writer_id))
            self._resources[identity_seq] = self._redactor.resource(encoded)
        return self._resources[identity_seq]

    # -- files ---------------------------------------------------------------------------------------------------------

    def _names(self) -> list[str]:
        follow = self.facts.get("follow")
        if isinstance(follow, dict):
            return [*(name for name in ("out", "err") if name in follow), "records"]
        return [*(name for name in ("out", "err") if name in self.files or (self.folder / name).exists()), "records"]

    def _add_file(self, name: str) -> None:
        follow = self.facts.get("follow")
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

    def paths(self) -> list[str]:
        """The files whose change is news of this writer."""
        return [self._identity.path, *(str(file.path) for file in self.files.values())]

    def observe(self, now: int) -> bool:
        """Look at everything once; True if something is new. Raises OSError for a folder that is gone or unreadable."""
        fresh = self.read_identity(now)
        for file in self.files.values():
            fresh = file.observe(now) or fresh
        self._release_held(now)
        final = self.ended and not self.facts.get("until_agent")
        for file in self.files.values():
            file.cut_partial(now, final=final)
        if not self._told and self._identity.lines and not any(file.held for file in self.files.values()):
            self._tell_identity(now)
        if not self.ended:
            self._look_for_end(now)
        return fresh

    def _tell_identity(self, now: int) -> None:
        self._told = True
        if not self.facts.get("silent_end"):
            self.decide("", 0, 0, "event", {"name": "skyrl.identity"}, now)

    # -- end -----------------------------------------------------------------------------------------------------------

    @property
    def pidfd(self) -> int | None:
        """Becomes readable when the process ends; None where the kernel has none."""
        return self._process.pidfd

    def _look_for_end(self, now: int) -> None:
        if not self._is_gone():
            return
        known = self._process.exit(self.facts.get("goodbye"), now)
        if known is None:
            return
        for file in self.files.values():
            if file.is_gone():
                file.count_gone()
            else:
                file.observe(now, final=True)
            if file.held:
                self._release(file)
        last = max((file.last_line() for file in self.files.values()), default=(0, ""))[1]
        self.ended = True  # not before all that may fail: it is tried again then
        if not self.facts.get("silent_end"):  # behind the last lines, whose moments are taken
            self.decide("", 0, 0, "end", self._process.describe(known, self.facts, last), now)

    def _is_gone(self) -> bool:
        return not self.is_alive() if self.pidfd is None else self._process.is_due

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

    # -- journal and checkpoint ----------------------------------------------------------------------------------------

    def decide(
        self, file: str, generation: int, offset: int, kind: Any, value: Any, now: int | None = None
    ) -> Decision:
        """Journal a decision; those that are records of their own wait to be sent."""
        if kind not in ownrecords.KINDS:
            return self._journal.add(file, generation, offset, kind, value)
        value = {**value, "time": self._moments.take(now or time.time_ns()), "identity": self._identity.seq}
        decision = self._journal.add(file, generation, offset, kind, value)
        self.own.add(decision)
        return decision

    def _encode(self, decision: Decision) -> bytes:
        facts = self._identity.in_force(decision.value["identity"])
        return self._redactor.field(ownrecords.encode(decision, self.writer_id, facts))

    def flush(self) -> None:
        """Decisions to disk; nothing built on them may leave before. Raises OSError."""
        self._journal.flush()

    @property
    def low_water(self) -> int:
        """Of the own records: the lowest journal seq that may be sent again."""
        return self.own.low_water(self._journal.next_seq)

    def write_checkpoint(self) -> None:
        """Put the acknowledged positions on disk, then give the bytes below back. Raises OSError."""
        self.flush()
        acked = {name: file.acked for name, file in self.files.items()}
        Checkpoint(acked, self.low_water).write(self.folder / "checkpoint")
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
        kept += self.own.kept()
        # Seq numbers are uids: the next one must never fall back below one that was used.
        kept.append(Decision(self._journal.next_seq - 1, "", 0, 0, "mark", 0))
        unique = {decision.seq: decision for decision in reversed(kept)}
        self._journal.rewrite([unique[seq] for seq in sorted(unique)])

    # -- how much ------------------------------------------------------------------------------------------------------

    @property
    def backlog_bytes(self) -> int:
        return sum(file.backlog for file in self.files.values())

    @property
    def has_work(self) -> bool:
        """Whether something could be put into a request now."""
        return bool(self.own.waiting) or any(file.ready for file in self.files.values())

    @property
    def is_drained(self) -> bool:
        """Nothing is left to deliver as of the last look, but partial lines younger than a second."""
        if not self.own.all_delivered or (not self.ended and self._process.is_due):
            return False
        return all(file.is_drained for file in self.files.values())

    @property
    def is_delivered(self) -> bool:
        return self.own.all_delivered and all(file.unacked == 0 for file in self.files.values())

    def close(self) -> None:
        self._journal.close()
        for file in self.files.values():
            file.close()
        self._process.close()
