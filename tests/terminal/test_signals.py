"""Signals and job control, with a real terminal's own and with kill(2)."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from .conftest import LAUNCHER, Launcher, python, wait_until

COUNT = """
import os, signal, sys, time
seen = []
def note(number, frame):
    seen.append(signal.Signals(number).name)
    os.write(1, (seen[-1] + "\\n").encode())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT, signal.SIGWINCH, signal.SIGCONT):
    signal.signal(number, note)
os.write(1, b"ready\\n")
end = time.monotonic() + 20
while time.monotonic() < end and not os.path.exists("stop"):
    time.sleep(0.02)
print("saw", " ".join(seen), os.get_terminal_size(1) if os.isatty(1) else "")
"""


def test_ctrl_c_reaches_the_child_once(launch: Launcher) -> None:
    terminal = launch.terminal(*python(COUNT))
    terminal.read_until(b"ready")
    terminal.send(b"\x03")
    terminal.read_until(b"SIGINT")
    time.sleep(0.2)
    (launch.cwd / "stop").touch()
    assert terminal.finish() == 0
    assert b"saw SIGINT \r\n" in terminal.output.replace(b"os.terminal_size(columns=80, lines=24)", b"")


def test_ctrl_c_on_a_plain_program_ends_both_by_sigint(launch: Launcher) -> None:
    terminal = launch.terminal(*python("import time; print('ready', flush=True); time.sleep(20)"))
    terminal.read_until(b"ready")
    terminal.send(b"\x03")
    assert os.WTERMSIG(terminal.finish()) == signal.SIGINT
    assert b"KeyboardInterrupt" in launch.recorded()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGQUIT"])
def test_a_signal_to_the_launcher_is_passed_on(launch: Launcher, name: str) -> None:
    process = launch.start(*python(COUNT))
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.send_signal(getattr(signal, name))
    assert process.stdout.readline() == name.encode() + b"\n"
    (launch.cwd / "stop").touch()
    assert process.stdout.readline() == b"saw " + name.encode() + b" \n"
    assert process.wait(30) == 0


def test_nohup_holds_for_the_child(launch: Launcher) -> None:
    code = "import signal; print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)"
    process = launch.start(*python(code), prefix=("sh", "-c", 'trap "" HUP; exec "$0" "$@"'))
    assert b"True" in process.communicate(timeout=30)[0]


def test_window_size_follows(launch: Launcher) -> None:
    terminal = launch.terminal(*python(COUNT))
    terminal.read_until(b"ready")
    terminal.resize(50, 132)
    terminal.read_until(b"SIGWINCH")
    time.sleep(0.2)
    (launch.cwd / "stop").touch()
    terminal.finish()
    assert b"columns=132, lines=50" in terminal.output


def test_ctrl_z_and_fg(launch: Launcher) -> None:
    """A shell with job control sees its job stop and go on."""
    code = "import time\nfor i in range(200): print('tick', i, flush=True); time.sleep(.05)\n"
    (launch.cwd / "loop.py").write_text(code)
    launch.env |= {"PS1": "$ "}
    shell = launch.terminal("bash", "--norc", "-i", bare=True)
    shell.read_until(b"$ ")
    launcher = " ".join([sys.executable, "-c", f"'{LAUNCHER[2]}'", sys.executable, "loop.py"])
    shell.send(launcher.encode() + b"\n")
    shell.read_until(b"tick 3")
    shell.send(b"\x1a")
    shell.read_until(b"Stopped")
    shell.read_until(b"$ ", start=len(shell.output) - 3)
    stopped_at = shell.output.count(b"tick")
    time.sleep(0.5)
    shell.send(b"echo quiet\n")
    shell.read_until(b"quiet\r\n")
    assert shell.output.count(b"tick") == stopped_at
    shell.send(b"fg\n")
    shell.read_until(f"tick {stopped_at + 3}".encode())
    shell.send(b"\x03")
    shell.read_until(b"KeyboardInterrupt")
    shell.read_until(b"$ ", start=shell.output.index(b"KeyboardInterrupt"))
    shell.send(b"echo code $?; exit\n")
    shell.read_until(b"code 130")


def test_a_child_that_ignores_ctrl_z_is_not_stopped(launch: Launcher) -> None:
    code = (
        "import os, signal, time\nsignal.signal(signal.SIGTSTP, lambda *_: os.write(1, b'no\\n'))\n"
        "print('ready', flush=True); time.sleep(1); print('done')"
    )
    terminal = launch.terminal(*python(code))
    terminal.read_until(b"ready")
    terminal.send(b"\x1a")
    terminal.read_until(b"no\r\n")
    terminal.read_until(b"done\r\n")
    assert terminal.finish() == 0


def test_a_sigstop_to_the_child_alone_does_not_stop_the_launcher(launch: Launcher) -> None:
    """A watchdog that stops and continues the child by pid must not leave us stopped for good."""
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(.5); print('done')"
    process = launch.start(*python(code))
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: _state(pid) == "T", "the child to stop")
    time.sleep(0.1)
    assert _state(process.pid) != "T"
    os.kill(pid, signal.SIGCONT)
    assert process.stdout.readline() == b"done\n"
    assert process.wait(30) == 0


def test_a_hang_up_ends_the_child(launch: Launcher) -> None:
    terminal = launch.terminal(*python("import time; print('ready', flush=True); time.sleep(20)"))
    terminal.read_until(b"ready")
    os.kill(terminal.pid, signal.SIGHUP)
    assert os.WTERMSIG(terminal.finish()) == signal.SIGHUP


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]
