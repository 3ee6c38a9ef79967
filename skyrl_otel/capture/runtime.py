"""The one guarded runtime of a process: its folders, streams and watch thread. Made by `start`, ended by `detach`.

What is captured and how is decided elsewhere: in `attach.py`, and for Ray's workers in their hook.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from skyrl_otel.capture import children, fds, guard, identity
from skyrl_otel.capture.console import Mode
from skyrl_otel.capture.folders import FollowedFolder
from skyrl_otel.capture.handler import Recording, provide
from skyrl_otel.capture.kin import Kin
from skyrl_otel.capture.levels import Levels
from skyrl_otel.capture.stream import LineStream
from skyrl_otel.capture.watch import Watch
from skyrl_otel.config import Config
from skyrl_otel.spool import layout
from skyrl_otel.spool.layout import RunDir, SpoolRefused
from skyrl_otel.spool.writer import WriterFolder

AGENT_CHECK_S = 2.0
# Text without an end goes out after one to two of these. A print is two calls, and between them a thread may wait for the
# interpreter that long on a busy machine: sooner would tear its line.
PARTIAL_TICK_S = 0.5
IDLE_TICK_S = 0.1


class Runtime:
    """The folders, streams and the watch thread of this process. Made by `start`, ended by `stop`."""

    def __init__(self, config: Config, run: RunDir) -> None:
        self.config = config
        self.run = run
        self.watch = Watch()
        self.pid = os.getpid()
        self.facts: identity.Facts = {}
        self.folder: WriterFolder | None = None
        self._folders: list[WriterFolder] = []
        self._saved: fds.Saved | None = None
        self._streams: dict[str, tuple[Any, LineStream]] = {}
        self._lock = threading.RLock()  # protects folder, _folders, _saved, _streams, facts
        self.recording = Recording(self._place_of_records, Levels(config.levels), Kin(run))
        self._records_of = ""
        self.takes_records = False
        self.is_attached = False

    def redirect(self, facts: Mapping[str, Any], last_words: Mapping[int, str] | None = None) -> WriterFolder:
        """Point fds 1 and 2 at a new folder of the spool.

        Args:
            facts: who writes there.
            last_words: descriptor → text that still goes to where it pointed before.

        Raises:
            OSError: then output stays where it was.
        """
        with self._lock:
            folder = WriterFolder.create(self.run, facts=facts)
            try:
                for descriptor, text in (last_words or {}).items():
                    if text:
                        os.write(descriptor, text.encode(errors="backslashreplace"))
                saved = fds.redirect({fds.STDOUT: folder.fds["out"], fds.STDERR: folder.fds["err"]})
            except OSError:
                folder.close()
                raise
            if self._saved is None:
                self._saved = saved
            else:
                for descriptor in saved.descriptors.values():
                    os.close(descriptor)
            self._adopt(folder, facts)
            if not self.config.launched:  # else the launcher has seen to it
                children.equip(self.run)
            return folder

    def follow(
        self, places: Mapping[str, tuple[fds.Place, int]], facts: Mapping[str, Any], *, skip_markers: bool
    ) -> FollowedFolder:
        """Have the agent read files where they lie. Raises OSError."""
        with self._lock:
            folder = FollowedFolder.follow(self.run, places, facts, skip_markers=skip_markers)
            self._adopt(folder, facts)
            return folder

    def records_only(self, facts: Mapping[str, Any]) -> WriterFolder:
        """A folder without output, by which this process is known. Raises OSError."""
        with self._lock:
            folder = WriterFolder.create(self.run, files=(), facts=facts)
            self._adopt(folder, facts)
            return folder

    def _adopt(self, folder: WriterFolder, facts: Mapping[str, Any]) -> None:
        self.folder = folder
        self._folders.append(folder)
        self.facts = dict(facts)
        self._records_of = folder.writer_id
        self.recording.records.use(folder)
        self.recording.echo(*self._echo())

    def _echo(self) -> tuple[dict[int, Mode], bytes]:
        """What becomes of console echoes: by who records descriptors 1 and 2 now."""
        if self._saved is not None:
            return {fds.STDOUT: "skip", fds.STDERR: "skip"}, b""
        if isinstance(self.folder, FollowedFolder):
            return dict.fromkeys(self.folder.descriptors(), "note"), b""
        inherited = fds.leading_into(str(self.run.path))
        if inherited:
            return dict.fromkeys(inherited, "skip"), b""
        nonce, marked = fds.marked(self.config.echo)
        return dict.fromkeys(marked, "mark"), nonce

    def _place_of_records(self) -> WriterFolder | None:
        """A folder for records alone: of a forked child, whose output is its parent's, or in the place of one that is gone.

        Raises OSError, SpoolRefused.
        """
        if not self._records_of:
            return None
        facts = identity.of_child(self.facts, self._records_of)
        try:
            run = layout.open_run(self.config.spool_root, self.run.run_id)
            folder = WriterFolder.create(run, files=(), facts=facts)
        except (OSError, SpoolRefused) as error:
            if self.pid != os.getpid():
                # A child that never gets a folder has nowhere else to say what it loses.
                guard.say(f"records of the forked process {os.getpid()} are lost: {error}")
            raise
        self._records_of = folder.writer_id
        return folder

    def start_recording(self, *, attached: bool = True) -> None:
        """Take the records of `logging` and loguru from now on. `attached` is False where nobody has asked for more yet."""
        self.is_attached = self.is_attached or attached
        if self.takes_records:
            return
        self.takes_records = True
        self.recording.start()
        # Behind the start: all that is made from now on is taken. Not so before, unless the first record has brought us here.
        self.publish({"records_since": time.time() if attached else 0.0})
        self.watch.add("records", self._look_after_records, AGENT_CHECK_S)

    def _look_after_records(self) -> float | None:
        self.recording.look_after()
        return AGENT_CHECK_S

    def publish(self, changes: Mapping[str, Any]) -> None:
        """Say something new about this process from here on. Raises OSError."""
        with self._lock:
            if self.pid != os.getpid():
                return
            if self.folder is None:
                self.facts.update(changes)  # for the folder to come
                return
            news = {key: value for key, value in changes.items() if self.facts.get(key) != value}
            if news:
                self.facts.update(news)
                self.folder.publish(news)

    def install_streams(self, marker: Any = None) -> None:
        """Put line-atomic streams in the place of `sys.stdout` and `sys.stderr`, where those write to 1 and 2."""
        with self._lock:
            for name, descriptor in (("stdout", fds.STDOUT), ("stderr", fds.STDERR)):
                found = getattr(sys, name)
                if found is None or isinstance(found, LineStream) or _fileno(found) != descriptor:
                    continue
                found.flush()
                stream = LineStream(descriptor, found, marker)
                setattr(sys, name, stream)
                self._streams[name] = (found, stream)
        self.watch.add("partial", self._push_partial, IDLE_TICK_S)

    def streams(self) -> list[LineStream]:
        return [stream for _, stream in self._streams.values()]

    def _push_partial(self) -> float | None:
        streams = self.streams()
        if not streams:
            return None
        busy = False
        for stream in streams:
            if stream.active:
                busy = stream.push_partial() or busy
        return PARTIAL_TICK_S if busy else IDLE_TICK_S

    def _restore_streams(self) -> None:
        for name, (found, stream) in self._streams.items():
            stream.drain()
            if getattr(sys, name) is stream:
                setattr(sys, name, found)
            else:
                # Somebody wrapped ours; it goes on writing to the descriptor, which is theirs again.
                stream.marker = None
        self._streams = {}

    def look_after(self, *, has_rank: bool = True) -> None:
        """Start the work of the watch thread: the agent, and the rank if it is still to come."""
        # Not left to the watch thread: a child forked within its import of `subprocess` would find that locked for ever.
        from skyrl_otel.capture import launch  # noqa: F401

        self.watch.add("agent", self.ensure_agent)
        if not has_rank:
            return
        identity.on_process_group(self.publish)
        self.await_rank()

    def await_rank(self) -> None:
        """Look out for the rank from now on, unless it is known."""
        if not isinstance(self.facts.get("rank"), int):
            self.watch.add("rank", identity.RankWatch(self.publish), 0.05)

    def ensure_agent(self) -> float | None:
        """A task: start the node's agent where none runs."""
        # Imported here, in the watch thread: a worker's start does not wait for what it does not need yet.
        from skyrl_otel.capture import launch

        launch.ensure_agent(self.run)
        return AGENT_CHECK_S

    def stop(self, *, goodbye: bool) -> None:
        """Put fds and streams back and let the folders go."""
        with self._lock:
            self.watch.stop()
            with guard.guarded("runtime.records"):
                self.recording.look_after()
                self.recording.stop()
            with guard.guarded("runtime.streams"):
                self._restore_streams()
            if self._saved is not None:
                fds.restore(self._saved)
                self._saved = None
                children.unequip()
            for folder in self._folders:
                with guard.guarded("runtime.close"):
                    if goodbye:
                        folder.publish({"goodbye": {"code": None}})
                    folder.close()
            self.recording.close()
            self._folders, self.folder = [], None

    def at_exit(self) -> None:
        """Last words. Folders stay locked until the kernel closes them, so that what is printed later still counts.

        Nothing is flushed here but our own streams: Python's and C's exit do that themselves, and wait for nobody's lock.
        """
        for stream in self.streams():
            with guard.guarded("runtime.drain"):
                stream.drain()
        with guard.guarded("runtime.losses"):
            self.recording.look_after()
        if self.pid != os.getpid():
            return
        self.watch.stop()
        # An uncaught exception leaves its type behind; sys.exit(3) leaves nothing that could be read here.
        code = 1 if getattr(sys, "last_type", None) is not None else None
        for folder in self._folders:
            with guard.guarded("runtime.goodbye"):
                folder.publish({"goodbye": {"code": code}})


def _fileno(stream: Any) -> int:
    try:
        return int(stream.fileno())
    except (OSError, ValueError, AttributeError, TypeError):
        return -1


_runtime: Runtime | None = None
_lock = threading.RLock()  # protects _runtime


def changing() -> threading.RLock:
    """To be held by who looks whether there is a runtime and then makes or changes it: ``with changing():``."""
    return _lock


def current() -> Runtime | None:
    """The runtime of this process; None in a forked child, whose output is its parent's."""
    return _runtime if _runtime is not None and _runtime.pid == os.getpid() else None


def start(config: Config, run_id: str, *, quietly: bool = False) -> Runtime | None:
    """Open the run's spool folder and become this process's runtime; None, and one line for the user, where it cannot be.

    Idempotent: a second call returns the first one's runtime. `quietly`: without that line.
    """
    global _runtime
    with _lock:
        running = current()
        if running is not None:
            return running
        if not config.launched:  # else the launcher has said it
            for problem in config.problems:
                guard.say(problem)
        say = _silence if quietly else guard.say
        try:
            run = layout.open_run(config.spool_root, run_id)
            if not os.path.exists(run.agent_lock):
                layout.check_disk(config.spool_root, allow_tmpfs=config.allow_tmpfs)
        except SpoolRefused as refused:
            say(f"output is not recorded: {refused}")
            return None
        except OSError as error:
            say(f"output is not recorded: {config.spool_root}: {error.strerror}")
            return None
        if _runtime is None:
            atexit.register(_at_exit)
        else:
            # A forked child begins anew: what the parent's recording would take and write is this process's now.
            with guard.guarded("runtime.of_parent"):
                _runtime.recording.stop()
        _runtime = Runtime(config, run)
        provide(_recording)
        if not (config.endpoint or config.launched or config.run_id):
            from skyrl_otel.capture import alone  # few are, and a worker's start does not wait for it

            alone.gather(config, _runtime)
        return _runtime


def _silence(_: str) -> None:
    pass


def _recording() -> Recording | None:
    return _runtime.recording if _runtime is not None else None


@guard.never_raises
def _at_exit() -> None:
    if _runtime is not None:
        _runtime.at_exit()


@guard.never_raises
def detach() -> None:
    """Stop recording: fds and streams become what they were, what was recorded is delivered. Does nothing if not attached."""
    global _runtime
    with _lock:
        running = current()
        if running is not None:
            running.stop(goodbye=True)
            atexit.unregister(_at_exit)
        _runtime = None


def _in_child() -> None:
    # The lock may be held by a thread that does not exist here. What is captured stays the parent's: its fds are ours too.
    global _lock
    _lock = threading.RLock()
    guard.counts.clear()
    if _runtime is not None:
        _runtime._lock = threading.RLock()
        with guard.guarded("runtime.records_of_child"):
            _runtime.recording.after_fork()


os.register_at_fork(after_in_child=_in_child)
