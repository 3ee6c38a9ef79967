"""Where things lie in the spool, and the checks that keep a hostile /tmp out of it.

Every folder is 0700 and owned by the effective uid, every file 0600; both are opened with O_NOFOLLOW. A path that fails
a check is refused, never repaired: somebody else may have put it there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from threading import get_ident
from typing import NamedTuple

from skyrl_otel.config import is_run_id

JOB_FILE = "job-"
"""Begins the name of the empty file of each Ray job of the run that has had a worker on this node; its id follows."""

_WRITER_ID_LETTERS = 32
_HEX = frozenset("0123456789abcdef")

# statfs(2) f_type, from linux/magic.h and the file systems' own sources: locks or punched holes do not hold there.
_REMOTE = {
    0x6969: "NFS",
    0x0BD00BD0: "Lustre",
    0xFF534D42: "CIFS",
    0xFE534D42: "SMB2",
    0x517B: "SMB",
    0x65735546: "FUSE",
    0x47504653: "GPFS",
    0x19830326: "BeeGFS",
    0x00C36400: "Ceph",
    0x01021997: "9p",
    0x5346414F: "AFS",
}
_TMPFS = {0x01021994: "tmpfs", 0x858458F6: "ramfs"}


class SpoolRefused(Exception):
    """The spool cannot be used; the message says which path, why, and what to set instead."""


class RunDir(NamedTuple):
    """The folder of one run on one node."""

    path: Path
    run_id: str

    @property
    def agent_lock(self) -> Path:
        return self.path / "agent.lock"

    @property
    def token(self) -> Path:
        return self.path / "token"

    @property
    def status(self) -> Path:
        return self.path / "status"

    @property
    def lib(self) -> Path:
        return self.path / "lib"

    @property
    def store(self) -> Path:
        return self.path / "store"

    @property
    def store_file(self) -> Path:
        return self.store / "store.db"

    @property
    def copy_note(self) -> Path:
        """Says where the store was copied. While it is there, what lies in the spool has nothing that the copy has not."""
        return self.store / "copied"

    @property
    def launcher_lock(self) -> Path:
        """Held by the launcher that keeps the run's collector alive."""
        return self.path / "launcher.lock"

    @property
    def run_file(self) -> Path:
        return self.path / "run.json"

    def writers(self) -> Iterator[tuple[str, Path]]:
        """(writer id, folder) of each writer, in no order."""
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return
        for name in names:
            prefix, _, writer_id = name.partition("-")
            if prefix == "w" and len(writer_id) == _WRITER_ID_LETTERS and _HEX.issuperset(writer_id):
                yield writer_id, self.path / name


def new_writer_id() -> str:
    """128 random bits in hex: unique over nodes and runs without asking anybody."""
    return os.urandom(16).hex()


def ensure_private_dir(path: Path) -> None:
    """Make `path` (its parent must exist) with mode 0700, or check that what is there is ours alone.

    Raises:
        SpoolRefused: it is a link, no folder, another user's, open to others, or cannot be made.
    """
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise SpoolRefused(f"cannot make {path}: {error.strerror}; set SKYRL_OTEL_SPOOL_DIR to a local disk") from error
    try:
        found = os.lstat(path)
    except OSError as error:
        raise SpoolRefused(f"cannot use {path}: {error.strerror}; set SKYRL_OTEL_SPOOL_DIR") from error
    if not stat.S_ISDIR(found.st_mode):
        raise SpoolRefused(f"{path} is not a folder; remove it or set SKYRL_OTEL_SPOOL_DIR")
    if found.st_uid != os.geteuid():
        raise SpoolRefused(f"{path} belongs to uid {found.st_uid}, not {os.geteuid()}; set SKYRL_OTEL_SPOOL_DIR")
    if found.st_mode & 0o077:
        raise SpoolRefused(
            f"{path} has mode {found.st_mode & 0o777:04o}, open to others; chmod 0700 it or move it away"
        )


def open_run(root: Path, run_id: str) -> RunDir:
    """The run's folder below `root`, made if it is not there.

    Raises:
        SpoolRefused: see `ensure_private_dir`; or the run id is not a plain name.
    """
    if not is_run_id(run_id):
        raise SpoolRefused(f"run id {run_id!r} is no plain name of 1 to 80 letters, digits, '.', '_', '-'")
    if not root.parent.is_dir():
        try:
            root.parent.mkdir(parents=True, mode=0o700)
        except OSError as error:
            raise SpoolRefused(f"cannot make {root.parent}: {error.strerror}; set SKYRL_OTEL_SPOOL_DIR") from error
    ensure_private_dir(root)
    run = RunDir(root / run_id, run_id)
    ensure_private_dir(run.path)
    try:
        os.utime(run.path)  # whoever tidies up takes its hands off (`leftovers.py`)
    except FileNotFoundError:
        ensure_private_dir(run.path)
    return run


def existing_runs(root: Path) -> list[RunDir]:
    """The runs that have a folder below `root`, newest first (by the folder's birth, as far as mtime tells)."""
    try:
        entries = [entry for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    entries.sort(key=lambda entry: started_unix_nano(RunDir(Path(entry.path), entry.name)), reverse=True)
    return [RunDir(Path(entry.path), entry.name) for entry in entries if is_run_id(entry.name)]


def write_run_file(run: RunDir, *, project: str, log_dir: str, argv: list[str]) -> None:
    """Say once what this run is; a second caller changes nothing."""
    facts = {
        "run": run.run_id,
        "project": project,
        "started_unix_nano": time.time_ns(),
        "log_dir": log_dir,
        "argv": argv,
    }
    scratch = run.path / f".run.{os.urandom(6).hex()}"
    write_new(scratch, json.dumps(facts).encode())
    try:
        os.link(scratch, run.run_file)  # link(2) fails where rename(2) would replace: the first one wins
    except FileExistsError:
        pass
    finally:
        os.unlink(scratch)


def store_path(run: RunDir) -> Path:
    """Where the run's store lies: in the spool while a collector may write to it, else where that copied it."""
    if not run.store_file.exists():
        try:
            return Path(json.loads(read_file(run.copy_note))["path"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
    return run.store_file


def started_unix_nano(run: RunDir) -> int:
    """When the run began, by its run file, else by the folder's times; 0 if it is gone."""
    try:
        return int(json.loads(read_file(run.run_file))["started_unix_nano"])
    except (OSError, ValueError, KeyError, TypeError):
        try:
            return os.stat(run.path).st_ctime_ns
        except OSError:
            return 0


def open_file(path: Path, flags: int, mode: int = 0o600) -> int:
    """open(2) that follows no link and leaks to no child.

    Raises:
        OSError: ELOOP for a link, else as open(2).
    """
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode)


def read_file(path: Path, limit: int = 1 << 26) -> bytes:
    """The whole of a small file. Raises OSError."""
    descriptor = open_file(path, os.O_RDONLY)
    try:
        chunks = []
        while chunk := os.read(descriptor, min(limit, 1 << 20)):
            chunks.append(chunk)
            limit -= len(chunk)
            if limit <= 0:
                break
        return b"".join(chunks)
    finally:
        os.close(descriptor)


def write_new(path: Path, content: bytes) -> None:
    """Write a file that must not exist yet. Raises OSError."""
    descriptor = open_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        write_all(descriptor, content)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, content: bytes) -> None:
    """write(2) until all is taken. Raises OSError."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def replace_file(path: Path, content: bytes) -> None:
    """Replace `path` so that a reader, or a kill at any moment, sees the old content or the new. Raises OSError."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{get_ident()}")  # two threads may replace it at once
    try:
        descriptor = open_file(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            write_all(descriptor, content)
        finally:
            os.close(descriptor)
        os.replace(scratch, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(scratch)  # a full disk must not be filled by what could not be written
        raise


def check_disk(root: Path, *, allow_tmpfs: bool) -> None:
    """Refuse a spool where locks or punched holes would not work: the file system by name, then a live probe.

    Raises:
        SpoolRefused: naming the file system or the call that failed.
    """
    kind = _file_system(root)
    if kind in _REMOTE:
        raise SpoolRefused(f"{root} is on {_REMOTE[kind]}; set SKYRL_OTEL_SPOOL_DIR to a folder on a local disk")
    if kind in _TMPFS and not allow_tmpfs:
        raise SpoolRefused(
            f"{root} is on {_TMPFS[kind]}, whose pages count as the job's memory; "
            "set SKYRL_OTEL_SPOOL_DIR to a local disk, or SKYRL_OTEL_ALLOW_TMPFS=1 to accept that"
        )
    probe = root / f".probe.{os.urandom(6).hex()}"
    try:
        descriptor = open_file(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            os.unlink(probe)
            write_all(descriptor, b"\1" * 8192)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            punch(descriptor, 0, 4096)
            if os.pread(descriptor, 2, 4095) != b"\0\1":
                raise OSError(errno.EOPNOTSUPP, "punched bytes read back wrong")
        finally:
            os.close(descriptor)
    except OSError as error:
        why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"{error.strerror}"
        raise SpoolRefused(f"{root} cannot hold the spool: {why}; set SKYRL_OTEL_SPOOL_DIR to a local disk") from error


_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_KEEP_SIZE_PUNCH_HOLE = 0x01 | 0x02  # linux/falloc.h


def punch(descriptor: int, offset: int, length: int) -> None:
    """Give the bytes [offset, offset + length) back to the disk; they read as zeros. Raises OSError."""
    if _libc.fallocate(descriptor, _KEEP_SIZE_PUNCH_HOLE, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _file_system(path: Path) -> int:
    # struct statfs begins with a long f_type on every Linux architecture that Python and Ray run on.
    buffer = ctypes.create_string_buffer(512)
    if _libc.statfs(os.fsencode(path), buffer):
        return 0
    return ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF
