"""The exit code, or the signal, is the command's own."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from .conftest import Launcher, python


@pytest.mark.parametrize("code", [0, 1, 3, 126, 255])
def test_exit_code_is_the_childs(launch: Launcher, code: int) -> None:
    assert launch("sh", "-c", f"exit {code}").returncode == code


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGINT, signal.SIGPIPE])
def test_a_child_that_dies_of_a_signal_takes_the_launcher_with_it(launch: Launcher, number: signal.Signals) -> None:
    done = launch(
        *python(
            f"import os, signal; signal.signal({number}, 0) if {number} != 9 else 0; os.kill(os.getpid(), {number})"
        )
    )
    assert done.returncode == -number


def test_a_keyboard_interrupt_ends_as_one(launch: Launcher) -> None:
    assert launch(*python("raise KeyboardInterrupt")).returncode == -signal.SIGINT


def test_command_not_found_is_127(launch: Launcher) -> None:
    done = launch("no-such-command-here")
    assert (done.returncode, done.stderr) == (127, b"skyrl-otel: no-such-command-here: command not found\n")
    assert not list(launch.run_dir.writers())


def test_missing_path_is_127(launch: Launcher) -> None:
    done = launch("./no/such/file")
    assert (done.returncode, done.stderr) == (127, b"skyrl-otel: ./no/such/file: no such file\n")


def test_not_executable_is_126(launch: Launcher) -> None:
    (launch.cwd / "script.sh").write_text("echo hello\n")
    done = launch("./script.sh")
    assert done.returncode == 126
    assert done.stderr == b"skyrl-otel: ./script.sh is not executable; chmod +x it, or name its interpreter\n"


def test_a_folder_is_126(launch: Launcher) -> None:
    assert launch("/tmp").returncode == 126


def test_missing_interpreter_is_126(launch: Launcher) -> None:
    script = launch.cwd / "script.sh"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    done = launch("./script.sh")
    assert (done.returncode, done.stderr) == (126, b"skyrl-otel: ./script.sh: its interpreter is missing\n")


def test_a_script_without_interpreter_line_is_run_by_sh(launch: Launcher) -> None:
    script = launch.cwd / "script"
    script.write_text('echo "$1"; exit 5\n')
    script.chmod(0o755)
    done = launch("./script", "argument")
    assert (done.returncode, done.stdout) == (5, b"argument\n")


def test_no_command_says_what_to_write(launch: Launcher) -> None:
    done = launch()
    assert (done.returncode, done.stderr) == (
        2,
        b"skyrl-otel: no command given; write: skyrl-otel run -- python train.py\n",
    )


def test_the_child_has_the_signal_settings_it_would_have_without_us(launch: Launcher) -> None:
    # glibc's posix_spawn(3) leaves its own two signals (32, 33) ignored; glibc in the child sets them as it needs.
    status = "print([int(l.split()[1], 16) & ~0x180000000 for l in open('/proc/self/status') if l[:6] in ('SigBlk', 'SigIgn')])"
    bare = subprocess.run(python(status), capture_output=True, check=True).stdout
    assert launch(*python(status)).stdout == bare


def test_the_child_inherits_no_descriptor_but_the_terminals(launch: Launcher) -> None:
    show = "import os; print(sorted(int(n) for n in os.listdir('/proc/self/fd')), os.environ['SKYRL_OTEL_TERMINAL_FD'])"
    out = launch("sh", "-c", f'{os.fsdecode(python(show)[0])} -S -c "{show}"').stdout.decode()
    descriptors, terminal = out.strip().rsplit(maxsplit=1)
    assert descriptors == f"[0, 1, 2, 3, {terminal}]"  # 3 is listdir's own
