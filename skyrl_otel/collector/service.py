"""The collector's life: one per run, start, readiness, an orderly end.

A later life takes over where a killed one stopped: same token, same port if it is free, same files.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import os
import resource
import secrets
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from skyrl_otel.collector.agents import Agents
from skyrl_otel.collector.committer import Committer, free_bytes
from skyrl_otel.collector.receiver import Limits, Receiver
from skyrl_otel.collector.routes import Router
from skyrl_otel.collector.store import Store, StoreError, store_of
from skyrl_otel.collector.text import TextFile
from skyrl_otel.collector.texts import Texts
from skyrl_otel.spool import locks
from skyrl_otel.spool import settings as file_settings
from skyrl_otel.spool.layout import (
    RunDir,
    SpoolRefused,
    ensure_private_dir,
    open_file,
    read_file,
    replace_file,
    write_all,
)
from skyrl_otel.spool.leftovers import drop_store

CHANNELS = ("infra", "progress")
_LOCK_WAIT_S = 2.0
_PORT_WAIT_S = 3.0
_FINISH_S = 30.0  # for requests in flight at the end


class StartError(Exception):
    """The collector cannot start; the message says what and the way out."""


@dataclass(frozen=True, slots=True)
class Settings:
    """`port` 0 takes the earlier life's port, else any. `silence_s`: see `--exit-when-drained`. `keeper`: the command that
    starts whoever keeps this collector alive, which is called when nobody does any more."""

    run: RunDir
    log_dir: Path
    host: str
    port: int = 0
    control_only: bool = False
    exit_when_drained: bool = False
    silence_s: float = 600.0
    store_max_bytes: int = 50 << 30
    limits: Limits = field(default_factory=Limits)
    settings_file: str = ""
    keeper: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Ready:
    """The file `store/ready`: where this life listens and writes. `url` has no path; the text files are None for a
    listener that takes statuses only."""

    url: str
    pid: int
    log_dir: str
    infra: str | None
    progress: str | None


def read_ready(run: RunDir) -> Ready | None:
    """What the collector that lives now has published; None while there is none or it is not ready yet."""
    if not locks.is_held(run.store / "lock"):
        return None
    return _read_ready(run.store / "ready")


def _read_ready(path: Path) -> Ready | None:
    try:
        return Ready(**json.loads(read_file(path)))
    except (OSError, ValueError, TypeError):
        return None


def secret(run: RunDir) -> str:
    """The run's bearer token, made at the first call. It stays the same over the collector's lives.

    Raises:
        OSError: it can be neither read nor made.
    """
    path = run.store / "secret"
    scratch = run.store / f".secret.{secrets.token_hex(6)}"
    try:
        return read_file(path).decode().strip()
    except FileNotFoundError:
        pass
    descriptor = open_file(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        write_all(descriptor, secrets.token_urlsafe(32).encode() + b"\n")
        os.link(scratch, path)  # whoever links first wins; a reader never sees a half of it
    except FileExistsError:
        pass
    finally:
        os.close(descriptor)
        os.unlink(scratch)
    return read_file(path).decode().strip()


def main(settings: Settings) -> int:
    """Run until SIGTERM, SIGINT or, if so set, until nobody is left. Returns the exit code: 0 after an orderly end, 1 if
    the end was not, 2 if it could not start, 3 if another one serves this run."""
    try:
        lock = _take_lock(settings.run)
    except (SpoolRefused, OSError) as error:
        say(f"cannot start: {error}")
        return 2
    if lock is None:
        other = _read_ready(settings.run.store / "ready")
        say(
            f"run {settings.run.run_id} has a collector already"
            + (f": {other.url}, pid {other.pid}" if other else "; it is just starting")
        )
        return 3
    try:
        return asyncio.run(_serve(settings))
    except (StartError, StoreError) as error:
        say(f"cannot start: {error}")
        return 2
    finally:
        os.close(lock)


def say(line: str) -> None:
    """One line for the user."""
    print(f"skyrl-otel collector: {line}", file=sys.stderr, flush=True)


def _take_lock(run: RunDir) -> int | None:
    ensure_private_dir(run.store)
    deadline = time.monotonic() + _LOCK_WAIT_S
    while (lock := locks.take(run.store / "lock")) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return lock


async def _serve(settings: Settings) -> int:
    run = settings.run
    _allow_many_connections()
    # Rows are tuples of plain values, freed by their count; the collector of cycles only walks over them again and again.
    gc.set_threshold(100_000, 50, 50)
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    earlier = _set_aside_ready(run)
    agents = Agents(time.monotonic())
    store: Store | None = None
    texts: dict[str, TextFile] = {}
    router = Router(_read_settings(settings).routes)
    committer: Committer | None = None
    if not settings.control_only:
        _check_log_dir(settings.log_dir)
        _take_back(run)
        store = Store(run.store_file, run_id=run.run_id)
        for agent, heard, status in store.agents():
            agents.restore(agent, heard, status)
        texts = _open_texts(store, settings.log_dir)
        files = Texts(texts, settings.log_dir, store.texts())
        committer = Committer(store, files, max_bytes=settings.store_max_bytes, say=say, router=router)
        committer.start()
    receiver = Receiver(secret(run), committer, agents, settings.limits)
    runner = web.AppRunner(
        receiver.app(),
        access_log=None,
        auto_decompress=False,
        keepalive_timeout=settings.limits.keepalive_s,
        lingering_time=2.0,
        shutdown_timeout=_FINISH_S,
    )
    await runner.setup()
    assert runner.server is not None
    server = await _listen(receiver.guard(runner.server), settings, earlier)
    port = server.sockets[0].getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    paths = {channel: str(texts[channel].path) if channel in texts else None for channel in CHANNELS}
    ready = {"url": f"http://{host}:{port}", "pid": os.getpid(), "log_dir": str(settings.log_dir), **paths}
    replace_file(run.store / "ready", json.dumps(ready).encode())
    say(f"run {run.run_id} at {ready['url']}" + (f", writes {paths['infra']}" if texts else ", statuses only"))

    await _until_over(ending, agents, settings)

    server.close()
    await runner.cleanup()  # lets the requests in flight finish and closes idle connections
    receiver.close()
    if store is None or committer is None:
        return 0
    # In a thread of its own only for the loop's sake: signals stay handled while a large store is copied.
    return await asyncio.to_thread(_finish, settings, store, committer, texts)


async def _until_over(ending: asyncio.Event, agents: Agents, settings: Settings) -> None:
    while True:
        try:
            await asyncio.wait_for(ending.wait(), min(1.0, settings.silence_s))
            return
        except asyncio.TimeoutError:
            if settings.keeper and not locks.is_held(settings.run.launcher_lock):
                await _start_keeper(settings.keeper)
            if settings.exit_when_drained and agents.finished(time.monotonic(), settings.silence_s):
                return


async def _start_keeper(command: tuple[str, ...]) -> None:
    """It daemonises itself, so what is started here is soon over."""
    null = asyncio.subprocess.DEVNULL
    try:
        started = await asyncio.create_subprocess_exec(*command, stdin=null, stdout=null, stderr=null)
    except OSError as error:
        say(f"nobody keeps this collector alive: {error}")
        return
    await started.wait()


def _finish(settings: Settings, store: Store, committer: Committer, texts: dict[str, TextFile]) -> int:
    if not committer.stop(_FINISH_S):
        say("the last batch could not be committed in time; its sender keeps it")
        return 1
    for file in texts.values():
        file.close()
    try:
        needed, free = store.size_bytes(), free_bytes(settings.log_dir)
        if needed > free:
            raise OSError(errno.ENOSPC, f"{needed >> 20} MB needed, {free >> 20} MB free")
        copy = store.copy(settings.log_dir / f"{settings.run.run_id}.db")
        note = {"path": str(copy), "store": store.meta()["store"]}
    except (OSError, sqlite3.Error) as error:
        say(f"the store stays at {store.path}: it cannot be copied to {settings.log_dir} ({error})")
        store.close()
        return 1
    store.close()
    try:
        replace_file(settings.run.copy_note, json.dumps(note).encode())
        drop_store(settings.run)
    except OSError as error:
        say(f"the store stays at {store.path} too: {error}")
    return 0


def _take_back(run: RunDir) -> None:
    """Go on with what an earlier life of this run's collector copied to the log folder and dropped here.

    Raises:
        StartError: there is no room for it.
    """
    try:
        note = json.loads(read_file(run.copy_note))
        copy, name = Path(note["path"]), note["store"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StartError(f"cannot read {run.copy_note}, which says where the store lies: {error}") from error
    try:
        if not run.store_file.exists() and store_of(copy) == name:
            _fetch(copy, run)
        run.copy_note.unlink()
    except OSError as error:
        raise StartError(f"cannot bring the store back from {copy}: {error}; free space in {run.store}") from error


def _fetch(copy: Path, run: RunDir) -> None:
    drop_store(run)  # no write-ahead log of an earlier life may be taken for this one's
    scratch = run.store / ".store.db"
    scratch.unlink(missing_ok=True)
    descriptor = open_file(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    with open(descriptor, "wb") as target, open(copy, "rb") as source:
        shutil.copyfileobj(source, target, 1 << 20)
    os.replace(scratch, run.store_file)


def _read_settings(settings: Settings) -> file_settings.Settings:
    try:
        return file_settings.read(settings.settings_file)
    except file_settings.SettingsError as error:
        raise StartError(str(error)) from error


def _check_log_dir(log_dir: Path) -> None:
    try:
        log_dir.parent.mkdir(parents=True, exist_ok=True)
        try:
            log_dir.mkdir(mode=0o700)
        except FileExistsError:
            pass
        probe = log_dir / f".probe.{secrets.token_hex(6)}"
        os.close(open_file(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        probe.unlink()
    except OSError as error:
        raise StartError(
            f"cannot write to the log folder {log_dir}: {error.strerror}; set SKYRL_OTEL_LOG_DIR to one that is writable"
        ) from error


def _open_texts(store: Store, log_dir: Path) -> dict[str, TextFile]:
    stored = store.texts()
    known = {
        channel: stored[channel] for channel in CHANNELS if channel in stored and stored[channel][0].parent == log_dir
    }
    try:
        if set(known) != set(CHANNELS):
            known = {channel: (path, 0) for channel, path in _new_texts(log_dir).items()}
        texts = {channel: TextFile(path, length) for channel, (path, length) in known.items()}
    except OSError as error:
        raise StartError(f"cannot write to the log folder {log_dir}: {error}; set SKYRL_OTEL_LOG_DIR") from error
    store.begin()
    for channel, file in texts.items():
        store.set_text(channel, file.path, file.length)
    store.commit()
    return texts


def _new_texts(log_dir: Path) -> dict[str, Path]:
    """Two new names of the same second. Another run that began in that second has its own."""
    stamp = time.strftime("%y%m%d_%H%M%S")
    for suffix in ("", *(f"_{number}" for number in range(2, 1000))):
        paths = {channel: log_dir / f"{channel}-{stamp}{suffix}.log" for channel in CHANNELS}
        made: list[Path] = []
        try:
            for path in paths.values():
                os.close(open_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
                made.append(path)
            return paths
        except FileExistsError:
            for path in made:
                path.unlink()
    raise OSError(errno.EEXIST, f"a thousand runs began at {stamp}")


def _set_aside_ready(run: RunDir) -> Ready | None:
    """The earlier life's readiness, out of the way: from now on the file `ready` means this life."""
    path, aside = run.store / "ready", run.store / "ready.earlier"
    try:
        os.replace(path, aside)
    except FileNotFoundError:
        pass
    return _read_ready(aside)


async def _listen(factory: Callable[[], asyncio.Protocol], settings: Settings, earlier: Ready | None) -> asyncio.Server:
    loop = asyncio.get_running_loop()
    again = int(earlier.url.rpartition(":")[2]) if earlier is not None else 0
    port = settings.port or again
    deadline = time.monotonic() + _PORT_WAIT_S
    while True:
        try:
            return await loop.create_server(factory, settings.host, port, backlog=1024)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or port == 0:
                raise StartError(
                    f"cannot listen on {settings.host} port {port}: {error.strerror}; set --host"
                ) from error
            if time.monotonic() > deadline:
                if settings.port not in (0, again):
                    raise StartError(f"port {port} of {settings.host} is taken; choose another --port") from error
                say(f"port {port} of the earlier collector is taken; agents must be told the new one")
                port = 0
        await asyncio.sleep(0.1)


def _allow_many_connections() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        pass
