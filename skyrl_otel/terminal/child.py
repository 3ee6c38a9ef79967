"""The user's command as a process: found as a shell finds it, spawned in our place, ended as a shell sees it end."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NoReturn

NOT_EXECUTABLE = 126
NOT_FOUND = 127

# Python ignores these from its start; a command expects the default (as `subprocess` has it).
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


class CommandError(Exception):
    """The command cannot be run; `code` is what a shell returns for that."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def find(name: str) -> str:
    """The path of the executable that `name` means.

    Raises:
        CommandError: there is none (127), or it is no executable file (126).
    """
    candidates = [name] if "/" in name else [os.path.join(folder or ".", name) for folder in os.get_exec_path()]
    refused = ""
    for path in candidates:
        try:
            found = os.stat(path)
        except OSError:
            continue
        if stat.S_ISDIR(found.st_mode):
            refused = refused or f"{path} is a folder"
        elif not os.access(path, os.X_OK):
            refused = refused or f"{path} is not executable; chmod +x it, or name its interpreter"
        else:
            return path
    if refused and "/" in name:
        raise CommandError(refused, NOT_EXECUTABLE)
    if refused and "executable" in refused:
        raise CommandError(refused, NOT_EXECUTABLE)
    where = "no such file" if "/" in name else "command not found"
    raise CommandError(f"{name}: {where}", NOT_FOUND)


def spawn(
    path: str,
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    outputs: Iterable[tuple[int, int]],
    mask: Iterable[int],
) -> int:
    """Start the command in our session and process group; its pid.

    Args:
        outputs: (descriptor here, descriptor there) of each output that is replaced.
        mask: the signal mask it starts with.

    Raises:
        CommandError: the kernel refuses to execute it.
    """
    actions = [(os.POSIX_SPAWN_DUP2, here, there) for here, there in outputs]
    options = {"file_actions": actions, "setsigmask": mask, "setsigdef": _IGNORED_BY_PYTHON}
    try:
        return os.posix_spawn(path, argv, environ, **options)  # type: ignore[arg-type]
    except OSError as error:
        if error.errno == errno.ENOEXEC:  # a script without `#!`: execvp(3) and every shell hand it to sh
            return os.posix_spawn("/bin/sh", ["/bin/sh", path, *argv[1:]], environ, **options)  # type: ignore[arg-type]
        raise CommandError(*_refusal(path, error)) from error


def become(path: str, argv: Sequence[str], mask: Iterable[int] | None = None) -> NoReturn:
    """Turn this process into the command, with nothing of ours around it.

    Raises:
        CommandError: the kernel refuses to execute it.
    """
    for number in _IGNORED_BY_PYTHON:
        signal.signal(number, signal.SIG_DFL)
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        os.execv(path, list(argv))
    except OSError as error:
        if error.errno == errno.ENOEXEC:
            os.execv("/bin/sh", ["/bin/sh", path, *argv[1:]])
        raise CommandError(*_refusal(path, error)) from error


def _refusal(path: str, error: OSError) -> tuple[str, int]:
    if error.errno == errno.ENOENT:  # the file is there, we have looked: its `#!` line names what is not
        return f"{path}: its interpreter is missing", NOT_EXECUTABLE
    return f"{path}: {error.strerror}", NOT_EXECUTABLE


def wait(
    pid: int, *, on_stop: Callable[[int], None], on_continue: Callable[[], None], on_end: Callable[[], None]
) -> int:
    """Wait for the child's end; its status as of waitpid(2). As PID 1, reap every orphan meanwhile.

    Args:
        on_stop: called with the signal each time the child has stopped.
        on_continue: called each time it goes on.
        on_end: called when it is dead and before it is reaped, while its pid still means nobody else.
    """
    whom = (os.P_ALL, 0) if os.getpid() == 1 else (os.P_PID, pid)
    while True:
        info = os.waitid(*whom, os.WEXITED | os.WSTOPPED | os.WCONTINUED | os.WNOWAIT)
        assert info is not None  # WNOHANG is not set
        if info.si_code in (os.CLD_STOPPED, os.CLD_CONTINUED, os.CLD_TRAPPED):
            os.waitid(os.P_PID, info.si_pid, os.WSTOPPED | os.WCONTINUED | os.WNOHANG)
            if info.si_pid == pid:
                on_continue() if info.si_code == os.CLD_CONTINUED else on_stop(info.si_status)
        elif info.si_pid == pid:
            on_end()
            return os.waitpid(pid, 0)[1]
        else:
            os.waitpid(info.si_pid, os.WNOHANG)


def exit_like(status: int) -> int:
    """The code to exit with after a child that ended with `status` (of waitpid).

    Does not return where the child died of a signal: whoever started us must see that signal, or a shell's loop would go
    on after Ctrl-C. Only as PID 1, which no signal kills, the code is 128 + the signal's number.
    """
    if not os.WIFSIGNALED(status):
        return os.WEXITSTATUS(status)
    number = os.WTERMSIG(status)
    if os.getpid() != 1:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the child has left its own, which is the one to look at
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        signal.pthread_kill(threading.get_ident(), number)  # to this thread: another one takes signals by sigwaitinfo
    return 128 + number
