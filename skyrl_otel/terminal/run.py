"""`skyrl-otel run -- CMD…`: the spool first, then CMD, then everything else beside it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from skyrl_otel.capture import identity
from skyrl_otel.capture.launch import ensure_agent
from skyrl_otel.collector import node_ip
from skyrl_otel.config import Config
from skyrl_otel.spool import layout, leftovers, library, locks, marks, settings, token
from skyrl_otel.spool.layout import RunDir, SpoolRefused
from skyrl_otel.spool.writer import WriterFolder
from skyrl_otel.terminal import child, pty, signals
from skyrl_otel.terminal import run_id as run_ids
from skyrl_otel.terminal.keeper import AgentKeeper
from skyrl_otel.terminal.pipes import Inlet, Pump, Stream, open_streams
from skyrl_otel.terminal.say import say
from skyrl_otel.terminal.screen import Screen
from skyrl_otel.terminal.supervise import Collector, hand_out_token

_NO_COMMAND = 2
# Variables that hold secrets; the agent has them from the 0600 token file.
_SECRETS = ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_LOGS_HEADERS")
_LAUNCHER_PID = "SKYRL_OTEL_LAUNCHER_PID"


def main(
    argv: Sequence[str], *, run_id: str | None = None, log_dir: str | None = None, config: Config | None = None
) -> int:
    """Run a command with its output recorded; the code to exit with, as a shell would see it.

    Does not return where the command died of a signal (this process then dies of the same), nor where nothing can be
    recorded: then the command takes this process's place after one line that says why.

    Args:
        argv: the command and its arguments.
        run_id: the run's name; default the job's, else a new one.
        log_dir: folder of the text files and the store; default from the environment.
        config: default `Config.from_env()`.
    """
    if not argv:
        say("no command given; write: skyrl-otel run -- python train.py")
        return _NO_COMMAND
    signals.let_ctrl_c_end_us()
    config = config or Config.from_env()
    for problem in config.problems:
        say(problem)
    try:
        settings.read(config.settings_file)
    except settings.SettingsError as error:
        say(f"{error}; nothing of it is used")
        os.environ.pop("SKYRL_OTEL_CONFIG", None)
        config = config._replace(settings_file="")
    if config.settings_file:  # the collector has another working folder
        os.environ["SKYRL_OTEL_CONFIG"] = str(Path(config.settings_file).expanduser().absolute())
    config = config._replace(
        run_id=run_id or config.run_id,
        log_dir=Path(log_dir).expanduser().absolute() if log_dir else config.log_dir,
    )
    try:
        path = child.find(argv[0])
        if config.disabled or _is_nested(os.environ):
            child.become(path, argv)
        try:
            launch = _prepare(argv, config)
        except (SpoolRefused, OSError) as error:
            say(f"nothing is recorded: {error}")
            child.become(path, argv)
        return launch.run(path)
    except child.CommandError as error:
        say(str(error))
        return error.code


def _prepare(argv: Sequence[str], config: Config) -> _Launch:
    """Raises SpoolRefused, OSError; the message is for the user."""
    if config.endpoint is None:
        _check_log_dir(config.log_dir)
    run_dir = _open_run(config)
    try:
        layout.check_disk(config.spool_root, allow_tmpfs=config.allow_tmpfs)
        layout.write_run_file(
            run_dir,
            project=config.project,
            log_dir="" if config.endpoint else str(config.log_dir),
            argv=list(argv),
        )
        lib = library.keep(run_dir)
        shipping = token.from_config(config)
        if shipping is not None:
            token.write(run_dir, shipping)
        streams = open_streams()
        facts = {
            "role": "driver",
            "channel": "progress",
            **identity.process_facts(config),
            "pid": None,
            "argv0": os.path.basename(argv[0]),
        }
        names = tuple(stream.name for stream in streams)
        writer = WriterFolder.create(run_dir, files=names, facts=facts)
        ensure_agent(run_dir)  # before signals are blocked: it would inherit that
    except (SpoolRefused, OSError):
        try:
            os.rmdir(run_dir.path)
        except OSError:
            pass
        raise
    return _Launch(argv, config, run_dir, lib, streams, writer)


def _open_run(config: Config) -> RunDir:
    """The run's folder. A job may start several commands one after the other: each is a run, named after the job."""
    name = run_ids.choose(config, os.environ)
    run_dir = layout.open_run(config.spool_root, name)
    if config.run_id:
        return run_dir
    again = 1
    while run_dir.run_file.exists() and not locks.is_held(run_dir.launcher_lock):
        again += 1
        run_dir = layout.open_run(config.spool_root, f"{name[:70]}.{again}")
    return run_dir


def _check_log_dir(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_dir():
            path.mkdir(mode=0o700)
    except OSError as error:
        raise OSError(f"cannot make {path}: {error.strerror}; set SKYRL_OTEL_LOG_DIR") from error
    if not os.access(path, os.W_OK | os.X_OK, effective_ids=True):
        raise OSError(f"cannot write to {path}; set SKYRL_OTEL_LOG_DIR")


def _is_nested(environ: Mapping[str, str]) -> bool:
    """Whether a launcher is among our ancestors: then it records us. (The variable alone proves nothing: a tmux server
    that was started in a run hands it to every later shell.)"""
    launcher = environ.get(_LAUNCHER_PID, "")
    pid = os.getppid()
    while pid > 0:
        if str(pid) == launcher:
            return True
        try:
            # Field 4 of /proc/<pid>/stat, counted behind the name, which may hold spaces: proc(5).
            pid = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return False
    return False


@dataclass(slots=True)
class _Launch:
    """All that is made before the command starts, and the run from there on."""

    argv: Sequence[str]
    config: Config
    run_dir: RunDir
    lib: Path
    streams: list[Stream]
    writer: WriterFolder

    def run(self, path: str) -> int:
        """Start the command and see it through. Raises CommandError."""
        inlet = Inlet()
        nonce = secrets.token_hex(marks.NONCE_BYTES // 2)
        mask, wanted = signals.block()
        outputs = [(stream.childs, fd) for stream in self.streams for fd in stream.replaces]
        pid = child.spawn(
            path,
            self.argv,
            self._environ(inlet.number, nonce),
            outputs=[*outputs, (inlet.childs, inlet.number)],
            mask=mask,
        )
        for fd in (inlet.childs, *(stream.childs for stream in self.streams)):
            os.close(fd)
        self._publish({"pid": pid})
        pumps = [Pump(stream, self.writer.fds[stream.name], self._on_loss, nonce) for stream in self.streams]
        inlet.show_beside(next((pump for pump in pumps if 1 in pump.stream.replaces), None))
        watcher = signals.Signals(pid, wanted, self._copy_window_size)
        collector = self._collector(mask)
        keeper = AgentKeeper(self.run_dir)
        for thread in (*pumps, inlet, watcher, collector, keeper):
            thread.start()

        from skyrl_otel.terminal import (
            finish,  # beside the child, not before it; and not when it may have been upgraded
        )

        def on_stop(number: int) -> None:
            for pump in pumps:
                pump.settle(0.1)
            watcher.child_stopped(number)

        status = child.wait(pid, on_stop=on_stop, on_continue=watcher.child_continued, on_end=watcher.ended)
        self._carry_rest(pumps, inlet, watcher)
        if os.WIFEXITED(status):
            self._publish({"goodbye": {"code": os.WEXITSTATUS(status)}})
        elif os.WIFSIGNALED(status):
            self._publish({"goodbye": {"signal": os.WTERMSIG(status)}})
        self.writer.close()
        screen = self._screen_of(2)
        if screen is not None:
            screen.end_row()
        try:
            finish.see_off(
                self.run_dir,
                self.config,
                collector,
                pid=pid,
                failed=status != 0,
                pumps=pumps,
                impatient=watcher.impatient,
                environ=os.environ,
            )
        except Exception as error:  # whatever it is, the command's exit code is worth more
            self._notice(f"the summary failed: {error!r}")
        keeper.stop()
        self._tidy_up()
        return child.exit_like(status)

    def _environ(self, terminal_fd: int, nonce: str) -> dict[str, str]:
        environ = {key: value for key, value in os.environ.items() if key not in _SECRETS or not self.config.endpoint}
        environ["SKYRL_OTEL_RUN_ID"] = self.run_dir.run_id
        environ["SKYRL_OTEL_LAUNCHER"] = "1"
        environ[_LAUNCHER_PID] = str(os.getpid())
        environ["SKYRL_OTEL_TERMINAL_FD"] = str(terminal_fd)
        files = [os.fstat(stream.childs) for stream in self.streams]
        environ["SKYRL_OTEL_ECHO"] = nonce + ";" + ",".join(f"{file.st_dev}:{file.st_ino}" for file in files)
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(self.lib), environ.get("PYTHONPATH"))))
        return environ

    def _collector(self, mask: frozenset[int]) -> Collector:
        return Collector(
            self.run_dir,
            self.config.log_dir,
            lambda: node_ip.find(os.environ, given=self.config.node_ip),
            control_only=self.config.endpoint is not None,
            mask=mask,
            on_ready=lambda ready: hand_out_token(self.run_dir, self.config, ready),
            on_failure=lambda why: self._notice(
                f"{why} (lines are kept in {self.run_dir.path}; see `skyrl-otel replay`)"
            ),
        )

    def _carry_rest(self, pumps: Sequence[Pump], inlet: Inlet, watcher: signals.Signals) -> None:
        for pump in pumps:
            pump.end()
        for pump in pumps:
            while pump.is_alive() and not watcher.impatient.is_set():
                pump.join(0.05)
            pump.salvage()
        inlet.join(0.2)

    def _tidy_up(self) -> None:
        library.let_go(self.run_dir)
        try:
            leftovers.settle_as_last(self.run_dir)
        except OSError:
            pass  # a later run's agent will

    def _copy_window_size(self) -> bool:
        changed = [pty.copy_window_size(stream.screen.fd, stream.ours) for stream in self.streams if stream.is_pty]
        return any(changed)

    def _publish(self, facts: Mapping[str, object]) -> None:
        try:
            self.writer.publish(facts)
        except OSError as error:
            self._on_loss(error)

    def _on_loss(self, error: OSError) -> None:
        self._notice(f"the spool takes no more ({error.strerror}); output goes on, unrecorded")

    def _notice(self, text: str) -> None:
        screen = self._screen_of(2)
        if screen is not None:
            screen.insert(f"skyrl-otel: {text}\n".encode(errors="backslashreplace"))

    def _screen_of(self, fd: int) -> Screen | None:
        return next((stream.screen for stream in self.streams if fd in stream.replaces), None)
