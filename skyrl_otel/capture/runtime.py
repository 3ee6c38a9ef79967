"""The one guarded runtime of a process: `attach` decides what is captured and how, `detach` puts everything back.

What the user's own code prints to where the user expects it is never moved: only infra processes (ranks other than 0,
Ray's workers) are redirected. A lone driver keeps its output, which is followed where it is a regular file.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

from skyrl_otel.capture import fds, guard, identity
from skyrl_otel.capture.console import Mode
from skyrl_otel.capture.folders import FollowedFolder
from skyrl_otel.capture.handler import Recording, provide
from skyrl_otel.capture.kin import Kin
from skyrl_otel.capture.levels import Levels
from skyrl_otel.capture.plan import Plan, Surroundings, plan
from skyrl_otel.capture.stream import LineStream
from skyrl_otel.capture.watch import Watch
from skyrl_otel.config import Channel, Config
from skyrl_otel.spool import layout
from skyrl_otel.spool.layout import RunDir, SpoolRefused
from skyrl_otel.spool.writer import WriterFolder

AGENT_CHECK_S = 2.0
# Text without an end goes out after one to two of these. A print is two calls, and between them a thread may wait for the
# interpreter that long on a busy machine: sooner would tear its line.
PARTIAL_TICK_S = 0.5
IDLE_TICK_S = 0.1

# Frameworks that are looked after once they are imported: module, where our code for it lives.
INTEGRATIONS = (("ray", "skyrl_otel.integrations.ray", "wrap_init"),)


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
        run = layout.open_run(self.config.spool_root, self.run.run_id)
        left_out = ("follow", "goodbye", "awaits", "lost", "errors")
        facts = {key: value for key, value in self.facts.items() if key not in left_out}
        facts.update(pid=os.getpid(), parent_pid=os.getppid(), parent=self._records_of, silent_end=True)
        folder = WriterFolder.create(run, files=(), facts=facts)
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

    def look_after(self) -> None:
        """Start the work of the watch thread: the agent, and the rank if it is still to come."""
        # Not left to the watch thread: a child forked within its import of `subprocess` would find that locked for ever.
        from skyrl_otel.capture import launch  # noqa: F401

        self.watch.add("agent", self.ensure_agent)
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
        if _is_alone(config):
            _start_collector(config, run)
        return _runtime


def _silence(_: str) -> None:
    pass


def _recording() -> Recording | None:
    return _runtime.recording if _runtime is not None else None


@guard.never_raises
def take_records() -> None:
    """For a process under `run` that nobody has called `attach()` in: its output is the launcher's, its records are its own.

    At the first record (`inject/sitecustomize.py`), and in a driver once it has a cluster. Says nothing, whatever happens:
    the program did not ask for us, and what is not taken here the launcher records as text.
    """
    with _lock:
        config = Config.from_env()
        if config.disabled or config.capture == "off":
            return
        running = start(config, identity.run_id(config), quietly=True)
        if running is None or running.takes_records:
            return
        if running.folder is None:
            inherited = fds.leading_into(str(running.run.path))
            channel = "infra" if inherited else "progress"
            facts = {"channel": channel, **running.facts, **_process_facts(config)}
            # How the command ended is for the launcher to tell; a child of it may be killed in passing. Not so a rank.
            is_rank = "rank" in facts
            is_itself = is_rank and not inherited and identity.is_rank_itself()
            running.records_only({"role": "trainer" if is_rank else "driver", "silent_end": not is_itself, **facts})
        running.start_recording(attached=False)
        running.look_after()


def watch_records(name: str, path: Any, target: Any) -> Any:
    """For `inject/sitecustomize.py`, in the middle of loguru's first import."""
    take_records()
    return sys.meta_path[0].find_spec(name, path, target)


@guard.never_raises
def start_records() -> None:
    """For `OTelLogHandler` without `attach()`: a place for records, nothing else."""
    with _lock:
        config = Config.from_env()
        if current() is not None or config.disabled or config.capture == "off":
            return
        run_id = identity.run_id(config)
        running = start(config, run_id)
        if running is None:
            return
        os.environ["SKYRL_OTEL_RUN_ID"] = run_id
        running.records_only({**identity.process_facts(config), "channel": "progress", **identity.rank_facts()})
        _bring_shipping(config, running)
        running.look_after()


def _is_alone(config: Config) -> bool:
    """Whether nobody else is there to gather this run: no endpoint, no launcher, and we are no rank or worker of one."""
    around = ("RANK", "TORCHELASTIC_RUN_ID", "SLURM_PROCID")
    return not (
        config.endpoint
        or config.launched
        or config.run_id
        or any(os.environ.get(name) for name in around)
        or _is_ray_worker()
    )


def _start_collector(config: Config, run: RunDir) -> None:
    from skyrl_otel.capture import launch  # subprocess costs a worker's start what only a lone driver needs
    from skyrl_otel.spool import settings

    with guard.guarded("runtime.collector"):
        try:
            settings.read(config.settings_file)
        except settings.SettingsError as error:
            guard.say(f"{error}; nothing of it is used")
            config = config._replace(settings_file="")
        layout.write_run_file(run, project=config.project, log_dir=str(config.log_dir), argv=sys.orig_argv)
        if not launch.start_collector(run, config.log_dir, config.settings_file):
            guard.say(
                "the embedded collector needs aiohttp and opentelemetry-proto, which are not installed here; "
                f"lines are kept in {run.path} (pip install skyrl-otel, or set OTEL_EXPORTER_OTLP_ENDPOINT)"
            )


@guard.never_raises
def _at_exit() -> None:
    if _runtime is not None:
        _runtime.at_exit()


@guard.never_raises
def attach(role: str | None = None, rank: int | None = None, channel: Channel | None = None) -> None:
    """Record this process's output, with who it is.

    Called twice, or where `skyrl-otel run` or the Ray hook attached already, it only adds what its arguments say.
    Never raises: where recording cannot start, output stays where it was and one line on stderr says why.

    Args:
        role: what the process does in the run: policy, rollout, reward, env, …
        rank: its rank, if it is not in RANK.
        channel: "progress" for what belongs on the user's terminal, "infra" for the rest; default by rank.
    """
    given = {"role": role, "rank": rank, "channel": channel}
    stated: identity.Facts = {key: value for key, value in given.items() if value is not None}
    with _lock:
        running = current()
        if running is not None and running.is_attached:
            running.publish(stated)
            return
        config = Config.from_env()
        if config.disabled or config.capture == "off":
            return
        install_integrations()
        if _is_ray_worker():
            _call("skyrl_otel.integrations.ray", "attach_worker", stated)
            return
        _attach_process(config, stated)


def _attach_process(config: Config, stated: identity.Facts) -> None:
    run_id = identity.run_id(config)
    running = start(config, run_id)
    if running is None:
        return
    os.environ["SKYRL_OTEL_RUN_ID"] = running.run.run_id  # children and Ray's workers belong to this run
    known = {key: value for key, value in running.facts.items() if key != "silent_end"}
    facts = {**known, **_process_facts(config), **stated}
    rank = facts.get("rank")
    around = Surroundings(
        stdout=fds.kind(fds.STDOUT),
        stderr=fds.kind(fds.STDERR),
        rank=rank if isinstance(rank, int) else None,
        channel=stated.get("channel"),
        notebook="ipykernel" in sys.modules,
    )
    what, sentence = plan(config, around)
    facts["channel"] = "infra" if what == "redirect" else "progress"
    if "role" not in facts:
        facts["role"] = "trainer" if around.rank is not None else "driver"
    try:
        _capture(running, what, facts)
    except OSError as error:
        guard.say(f"output is not recorded: {error}")
        return
    if sentence:
        guard.say(sentence)
    _bring_shipping(config, running)
    running.start_recording()
    running.look_after()


def _process_facts(config: Config) -> identity.Facts:
    return {**identity.process_facts(config), **identity.rank_facts()}


def _bring_shipping(config: Config, running: Runtime) -> None:
    if config.launched:
        return
    from skyrl_otel.spool import token

    with guard.guarded("runtime.shipping"):
        shipping = token.from_config(config)
        if shipping is not None:
            token.write(running.run, shipping)


def _capture(running: Runtime, what: Plan, facts: identity.Facts) -> None:
    early = running.folder  # a handler's, or the launcher's for a program that had not asked for us yet
    if what == "redirect":
        running.redirect(facts)
        running.install_streams()
        _silence_end(early)
        return
    places: dict[str, tuple[fds.Place, int]] = {}
    if what == "follow":
        inherited = fds.leading_into(str(running.run.path))  # recorded there already
        for name, descriptor in (("out", fds.STDOUT), ("err", fds.STDERR)):
            found = fds.place(descriptor)
            if not found or descriptor in inherited:
                continue
            if all((found.dev, found.ino) != (other.dev, other.ino) for other, _ in places.values()):
                places[name] = (found, found.size)
    if places:
        running.follow(places, facts, skip_markers=False)
        _silence_end(early)
    elif early is not None:
        running.publish({**facts, "silent_end": False})
    else:
        running.records_only(facts)


def _silence_end(folder: WriterFolder | None) -> None:
    if folder is not None:
        folder.publish({"silent_end": True})  # the process ends once, in its other folder


def install_integrations() -> None:
    """Have each framework looked after: now where it is imported already, else right after its import."""
    from skyrl_otel.capture.postimport import after_import

    for module, home, function in INTEGRATIONS:
        after_import(module, partial(_call_with_module, home, function))


def watch_imports(name: str, path: Any, target: Any) -> Any:
    """For `inject/sitecustomize.py`, in the middle of the first import of a framework: take over from there."""
    install_integrations()
    return sys.meta_path[0].find_spec(name, path, target)


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


def _is_ray_worker() -> bool:
    worker = sys.modules.get("ray._private.worker")
    found = getattr(worker, "global_worker", None)
    return found is not None and getattr(found, "mode", None) == getattr(worker, "WORKER_MODE", 1)


def _call_with_module(home: str, function: str, _: ModuleType) -> None:
    _call(home, function)


def _call(home: str, function: str, *args: Any) -> None:
    getattr(import_module(home), function)(*args)


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
