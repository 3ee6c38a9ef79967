"""Signals: the child gets what it would have got without us, once.

What the terminal sends (Ctrl-C, Ctrl-\\, Ctrl-Z, a hang-up) goes to the whole foreground process group, the child among
it: we leave it alone. What somebody sends to us alone is meant for the child and is passed on. After the child's end a
second SIGINT, SIGTERM or SIGQUIT means that the user does not want to wait.

All of it happens in one thread that takes blocked signals by sigwaitinfo(2), so nothing is ever interrupted.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable

_SI_KERNEL = 0x80  # asm-generic/siginfo.h: what the terminal driver puts into si_code

# Left to the kernel: faults, what cannot be caught, child state, and the background-access stops, which hit the
# process group as a whole.
_NOT_OURS = frozenset(
    {
        signal.SIGKILL,
        signal.SIGSTOP,
        signal.SIGCHLD,
        signal.SIGSEGV,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGILL,
        signal.SIGTRAP,
        signal.SIGSYS,
        signal.SIGPIPE,
        signal.SIGXCPU,
        signal.SIGXFSZ,
        signal.SIGTTIN,
        signal.SIGTTOU,
    }
)
_IMPATIENT = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGQUIT})
# A signal sent to child and launcher at once reaches us up to this long after the child died of it.
_SAME_SIGNAL_S = 0.3
_JOB_CONTROL = frozenset({signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})


def let_ctrl_c_end_us() -> None:
    """Until there is a command, Ctrl-C ends this process as it would have ended the command: without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def block() -> tuple[frozenset[int], frozenset[int]]:
    """Block what we handle, in this thread and all it starts: (the mask before, the signals blocked).

    What was ignored before us (`nohup`, a shell's background job) stays ignored, for us and for the child.
    """
    wanted = frozenset(
        int(number)
        for number in signal.valid_signals()
        if number not in _NOT_OURS and signal.getsignal(number) is not signal.SIG_IGN
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
    return frozenset(int(number) for number in before), wanted


class Signals(threading.Thread):
    """Passes signals on to `child` until `ended` is called; then `impatient` is set by the next one that asks to stop.

    `on_resize` copies the terminal's window size and says whether it changed.
    """

    def __init__(self, child: int, wanted: Iterable[int], on_resize: Callable[[], bool]) -> None:
        super().__init__(name="skyrl-otel-signals", daemon=True)
        self.impatient = threading.Event()
        self._child = child
        self._wanted = tuple(wanted)
        self._on_resize = on_resize
        self._ended_at: float | None = None
        self._sending = threading.Lock()  # after `ended` returned, nothing is sent to that pid any more
        self._stop_asked_at = -1.0
        self._child_is_stopped = False
        self._followed = False  # we have stopped for the stop that the child is in
        self._stopping = threading.Lock()  # protects the three above

    def ended(self) -> None:
        """The child is dead. To be called before it is reaped: after that its pid may be somebody else's."""
        with self._sending:
            self._ended_at = time.monotonic()

    def child_stopped(self, number: int) -> None:
        """The child has stopped: stop as well if that was job control, so that the shell sees its job stopped.

        A SIGSTOP to the child alone is somebody's private affair with it (a debugger, a watchdog).
        """
        with self._stopping:
            self._child_is_stopped = True
            if number in _JOB_CONTROL or time.monotonic() - self._stop_asked_at < 1:
                self._stop_with_child()

    def child_continued(self) -> None:
        """The child goes on, and so do we, or we would not know."""
        with self._stopping:
            self._child_is_stopped = self._followed = False

    def run(self) -> None:
        while True:
            info = signal.sigwaitinfo(self._wanted)
            self._handle(info.si_signo, from_terminal=info.si_code == _SI_KERNEL)

    def _handle(self, number: int, *, from_terminal: bool) -> None:
        if self._ended_at is not None:
            if number == signal.SIGTSTP:
                _stop()
            elif number in _IMPATIENT and time.monotonic() - self._ended_at > _SAME_SIGNAL_S:
                self.impatient.set()
            return
        if number in (signal.SIGWINCH, signal.SIGCONT) and self._on_resize():
            # The one that the terminal sent may have come to the child before the pty had its new size.
            self._send(signal.SIGWINCH)
            if number == signal.SIGWINCH:
                return
        if number == signal.SIGTSTP and from_terminal:
            with self._stopping:
                self._stop_asked_at = time.monotonic()
                if self._child_is_stopped:
                    self._stop_with_child()
        if not from_terminal:
            self._send(number)

    def _stop_with_child(self) -> None:
        if not self._followed:
            self._followed = True
            _stop()

    def _send(self, number: int) -> None:
        with self._sending:
            if self._ended_at is None:
                os.kill(self._child, number)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
