"""The launcher as PID 1 of a namespace, as in a container without an init."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from .conftest import Launcher, python, wait_until

NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


@pytest.fixture(autouse=True)
def _namespaces_work() -> None:
    tried = subprocess.run([*NAMESPACE, "true"], capture_output=True, text=True)
    assert tried.returncode == 0, f"this machine refuses pid namespaces: {tried.stderr}"


def test_exit_code_and_last_line(launch: Launcher) -> None:
    done = launch(*python("import os; os.write(1, b'last words\\n'); os._exit(7)"), prefix=NAMESPACE)
    assert done.returncode == 7
    assert launch.recorded() == b"last words\n"


def test_a_killed_child_gives_128_and_the_signal(launch: Launcher) -> None:
    assert launch("sh", "-c", "kill -9 $$", prefix=NAMESPACE).returncode == 137


def test_term_is_passed_on(launch: Launcher) -> None:
    code = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'term\\n'), sys.exit(4)))\n"
        "print(os.getppid(), flush=True); time.sleep(20)\n"
    )
    process = launch.start(*python(code), prefix=NAMESPACE)
    assert process.stdout is not None and process.stdout.readline() == b"1\n"
    inside = _children(process.pid)
    assert len(inside) == 1
    os.kill(inside[0], signal.SIGTERM)
    assert process.stdout.readline() == b"term\n"
    assert process.wait(30) == 4


def test_orphans_are_reaped(launch: Launcher) -> None:
    code = (
        "import os, subprocess, sys, time\n"
        "for _ in range(20): subprocess.run(['sh', '-c', '(sleep .05; exit 3) & exit 0'])\n"
        "time.sleep(.5)\n"
        "state = lambda pid: open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[0]\n"
        "print('zombies', [state(p) for p in os.listdir('/proc') if p.isdigit()].count('Z'))\n"
    )
    assert launch(*python(code), prefix=NAMESPACE).stdout == b"zombies 0\n"


def _children(pid: int) -> list[int]:
    found: list[int] = []

    def look() -> bool:
        with open(f"/proc/{pid}/task/{pid}/children") as children:
            found[:] = [int(child) for child in children.read().split()]
        return bool(found)

    wait_until(look, "the launcher")
    return found
