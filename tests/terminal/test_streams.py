"""What the child prints: recorded, and shown as without us."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest

from .conftest import Launcher, python, wait_until

TQDM = """
import sys, time
from tqdm import tqdm
for i in tqdm(range(30), desc="train", mininterval=0, miniters=10, bar_format="{desc} {n_fmt}/{total_fmt} {bar}"):
    if i % 10 == 5:
        tqdm.write(f"step {i}")
print("done", flush=True)
for i in tqdm(range(2), desc="outer", bar_format="{desc} {n_fmt} {bar}", miniters=1, mininterval=0):
    for j in tqdm(range(2), desc="inner", bar_format="{desc} {n_fmt} {bar}", leave=False, miniters=1, mininterval=0):
        pass
"""

RICH = """
import sys
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
console = Console()
console.print("[bold red]loss[/] 0.1", ":rocket:")
table = Table("a", "b"); table.add_row("1", "2"); console.print(table)
progress = Progress(auto_refresh=False, console=console)
with progress:
    task = progress.add_task("train", total=5)
    for i in range(5):
        progress.update(task, advance=0, description=f"step {i}")
        progress.refresh()
Console(stderr=True).log("to stderr", log_locals=False) if False else Console(stderr=True).print("[green]ok")
"""


def without_summary(output: bytes) -> bytes:
    return output.partition(b"\r\n\x1b[1mskyrl-otel\x1b[0m")[0]


@pytest.mark.parametrize("code", [TQDM, RICH], ids=["tqdm", "rich"])
def test_bars_and_colours_are_what_they_are_without_us(launch: Launcher, code: str) -> None:
    bare = launch.terminal(*python(code), bare=True)
    bare.finish()
    ours = launch.terminal(*python(code))
    ours.finish()
    assert without_summary(ours.output) == bare.output
    assert b"\x1b[" in bare.output
    assert launch.recorded() == bare.output.replace(b"\r\n", b"\n")


def test_each_stream_is_a_terminal_of_the_same_size(launch: Launcher) -> None:
    code = "import os, sys; print([os.isatty(i) for i in range(3)], os.get_terminal_size(1), os.get_terminal_size(2))"
    terminal = launch.terminal(*python(code), rows=33, columns=99)
    terminal.finish()
    size = "os.terminal_size(columns=99, lines=33)"
    assert launch.recorded().decode() == f"[True, True, True] {size} {size}\n"


def test_a_stream_that_is_no_terminal_stays_none(launch: Launcher) -> None:
    code = "import os; print([os.isatty(i) for i in range(3)])"
    terminal = launch.terminal("sh", "-c", f'"$0" -c "{code}" 2>/dev/null', sys.executable)
    terminal.finish()
    assert launch.recorded() == b"[True, True, False]\n"


def test_streams_are_recorded_apart(launch: Launcher) -> None:
    done = launch("sh", "-c", "echo one; echo two >&2; printf three")
    assert (done.stdout, launch.recorded("out"), launch.recorded("err")) == (b"one\nthree", b"one\nthree", b"two\n")
    assert done.stderr.startswith(b"two\n")


def test_one_open_file_for_both_keeps_the_order(launch: Launcher) -> None:
    code = "import os\nfor i in range(2000): os.write(1 + i % 2, b'%d\\n' % i)"
    expected = b"".join(b"%d\n" % i for i in range(2000))
    done = launch(*python(code), stderr=subprocess.STDOUT)
    assert done.stdout.startswith(expected)
    assert launch.recorded() == expected


def test_output_to_a_file_is_appended_where_it_stands(launch: Launcher) -> None:
    target = launch.cwd / "log"
    with target.open("ab") as log:
        log.write(b"before\n")
        log.flush()
        launch("sh", "-c", "echo line; echo error >&2", stdout=log, stderr=log)
    assert target.read_bytes().startswith(b"before\nline\nerror\nskyrl-otel: ")


def test_stdin_passes_through(launch: Launcher) -> None:
    process = launch.start("cat", stdin=subprocess.PIPE)
    out, _ = process.communicate(b"some\nbytes \xff\x00", timeout=30)
    assert out == b"some\nbytes \xff\x00"


def test_stdin_of_a_terminal_passes_through(launch: Launcher) -> None:
    terminal = launch.terminal(*python("print('got', input('name? '))"))
    terminal.read_until(b"name? ")
    terminal.send(b"x\n")
    terminal.read_until(b"got x\r\n")
    assert terminal.finish() == 0


def test_line_editing_works(launch: Launcher) -> None:
    terminal = launch.terminal(*python("import readline; print('got', input('> '))"))
    terminal.read_until(b"> ")
    terminal.send(b"ac\x1b[Db\n")
    terminal.read_until(b"got abc\r\n")
    assert terminal.finish() == 0


def test_a_reader_that_goes_away_ends_the_child_as_without_us(launch: Launcher) -> None:
    """`yes | head -1`: SIGPIPE, and what the pipe had taken is recorded."""
    process = launch.start("yes")
    assert process.stdout is not None
    line = process.stdout.readline()
    process.stdout.close()
    assert process.wait(30) == -13
    assert line == b"y\n"
    assert len(launch.recorded()) > 0


def test_python_sees_the_broken_pipe(launch: Launcher) -> None:
    code = (
        "import os, sys\n"
        "try:\n    while True: os.write(1, b'x' * 1000 + b'\\n')\n"
        "except BrokenPipeError: os.write(2, b'broken\\n')\n"
    )
    process = launch.start(*python(code))
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert b"broken\n" in process.stderr.read()
    assert process.wait(30) == 0
    assert launch.recorded("err") == b"broken\n"


def test_a_slow_reader_slows_the_child_and_not_its_other_stream(launch: Launcher) -> None:
    code = (
        "import os, threading\n"
        "def fill():\n"
        "    n = 0\n"
        "    while n < 1_000_000: n += os.write(1, b'x' * 999 + b'\\n')\n"
        "threading.Thread(target=fill).start()\n"
        "os.write(2, b'free\\n')\n"
    )
    process = launch.start(*python(code))
    assert process.stdout is not None and process.stderr is not None
    assert process.stderr.readline() == b"free\n"
    wait_until(lambda: len(launch.recorded()) >= 60_000, "the pipe to fill")
    settled = -1
    while settled != len(launch.recorded()):
        settled = len(launch.recorded())
        time.sleep(0.3)
    assert settled < 1_000_000, "the child ran on although nobody read"
    assert len(process.stdout.read()) == 1_000_000
    assert process.wait(30) == 0
    assert len(launch.recorded()) == 1_000_000


def test_a_grandchild_that_holds_the_pipe_does_not_hold_us(launch: Launcher) -> None:
    began = time.monotonic()
    done = launch("sh", "-c", "sleep 20 & echo started")
    assert done.returncode == 0
    assert time.monotonic() - began < 10
    assert launch.recorded() == b"started\n"
    subprocess.run(["pkill", "-f", "^sleep 20$"], check=False)


@pytest.mark.parametrize(
    "ending",
    ["os._exit(7)", "os.kill(os.getpid(), 9)", "raise SystemExit(7)", "1 / 0"],
)
@pytest.mark.parametrize("where", ["pipe", "terminal"])
def test_the_last_line_before_the_end_is_recorded(launch: Launcher, ending: str, where: str) -> None:
    command = python(f"import os; os.write(1, b'x' * 3000); os.write(1, b'last words'); {ending}")
    if where == "pipe":
        launch(*command)
    else:
        launch.terminal(*command).finish()
    assert b"x" * 3000 + b"last words" in launch.recorded()


def test_bytes_that_are_no_text_pass(launch: Launcher) -> None:
    data = bytes(range(256)) * 50
    (launch.cwd / "data").write_bytes(data)
    assert launch("cat", "data").stdout == data
    assert launch.recorded() == data


def test_a_closed_stdout_stays_closed(launch: Launcher) -> None:
    process = launch.start(
        *python("import os\ntry: os.fstat(1)\nexcept OSError: os.write(2, b'closed\\n')"),
        prefix=("sh", "-c", 'exec "$0" "$@" >&-'),
    )
    _, err = process.communicate(timeout=30)
    assert b"closed\n" in err
    assert launch.recorded("err") == b"closed\n"


def test_the_terminal_descriptor_is_shown_and_not_recorded(launch: Launcher) -> None:
    code = (
        "import os, sys, time\n"
        "fd = int(os.environ['SKYRL_OTEL_TERMINAL_FD'])\n"
        "print('mine', flush=True); os.write(fd, b'(train) theirs\\n'); time.sleep(.3); print('mine again')\n"
    )
    done = launch(*python(code))
    assert done.stdout == b"mine\n(train) theirs\nmine again\n"
    assert launch.recorded() == b"mine\nmine again\n"


def test_a_line_from_elsewhere_does_not_tear_a_bar(launch: Launcher) -> None:
    code = (
        "import os, sys, time\n"
        "fd = int(os.environ['SKYRL_OTEL_TERMINAL_FD'])\n"
        "os.write(2, b'\\r50% |##  |'); time.sleep(.2); os.write(fd, b'(train) hello\\n'); time.sleep(.2)\n"
        "os.write(2, b'\\r100% |####|\\n')\n"
    )
    terminal = launch.terminal(*python(code))
    terminal.finish()
    assert without_summary(terminal.output) == (
        b"\r50% |##  |" + b"\r\x1b[K(train) hello\r\n50% |##  |" + b"\r100% |####|\r\n"
    )
    assert launch.recorded() == b"\r50% |##  |\r100% |####|\n"


def test_environment_of_the_child(launch: Launcher) -> None:
    launch.env |= {"OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20geheim", "PYTHONPATH": "/mine"}
    launch("env")
    environ = dict(re.findall(r"^(\w+)=(.*)$", launch.recorded().decode(), re.MULTILINE))
    assert environ["PYTHONPATH"] == f"{launch.run_dir.lib}:/mine"
    assert environ["SKYRL_OTEL_RUN_ID"] == launch.run_dir.run_id
    assert environ["SKYRL_OTEL_LAUNCHER"] == "1"
    assert "OTEL_EXPORTER_OTLP_HEADERS" not in environ
    assert "geheim" in launch.run_dir.token.read_text()
    assert launch.run_dir.token.stat().st_mode & 0o777 == 0o600


def test_a_launcher_below_a_launcher_leaves_recording_to_it(launch: Launcher) -> None:
    from .conftest import LAUNCHER

    done = launch(*LAUNCHER, "sh", "-c", "echo once")
    assert done.stdout == b"once\n"
    assert launch.recorded() == b"once\n"
    assert len(list(launch.run_dir.writers())) == 1
