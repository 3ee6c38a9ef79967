"""Under `run`: what a console handler prints stands on the screen where it stood without us, and is recorded as a record."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.capture.frames import taken

from .conftest import Launcher, python

PROGRAM = """
import sys
if "attach" in sys.argv: import skyrl_otel; skyrl_otel.attach()
import logging
from loguru import logger
from rich.logging import RichHandler
logging.basicConfig(level="INFO", format="%(levelname)s %(message)s")
assert logging.root.handlers[0].stream.isatty() == sys.stderr.isatty()
log = logging.getLogger("app")
for number in range(200):
    print("printed", number)
    log.info("logged %d", number)
log.info("long " + "x" * 20000 + " end")
logger.remove(); logger.add(sys.stderr, format="<red>{message}</red>"); logger.info("in colour")
logging.root.handlers = [RichHandler(show_time=False, show_path=False)]; log.info("by rich")
print("done"); log.info("done")
"""


def records(launch: Launcher) -> list[str]:
    return [record.body for _, folder in launch.run_dir.writers() for record in taken(folder)]


WANTED = [
    *(f"logged {number}" for number in range(200)),
    "long " + "x" * 20000 + " end",
    "in colour",
    "by rich",
    "done",
]


def test_on_a_terminal_every_byte_stays_where_it_was(launch: Launcher) -> None:
    bare = launch.terminal(*python(PROGRAM), bare=True)
    bare.finish()
    terminal = launch.terminal(*python(PROGRAM), "attach")
    assert os.WEXITSTATUS(terminal.finish()) == 0, terminal.output[-500:]
    assert terminal.output.startswith(bare.output), "the launcher's own words come behind"
    assert records(launch) == WANTED
    recorded = launch.recorded().replace(b"\r\n", b"\n").decode().splitlines()
    assert recorded == [*(f"printed {number}" for number in range(200)), "done"]


def test_in_pipes_each_stream_keeps_its_own(launch: Launcher) -> None:
    bare = subprocess.run(python(PROGRAM), env=launch.env, capture_output=True, check=True)
    done = launch(*python(PROGRAM), "attach")
    assert done.stdout == bare.stdout and done.stderr.startswith(bare.stderr)
    assert records(launch) == WANTED
    assert launch.recorded("err") == b"" and launch.recorded().count(b"\n") == 201


def test_what_is_redirected_within_the_command_is_left_alone(launch: Launcher, tmp_path: Path) -> None:
    own = tmp_path / "own.log"
    script = 'exec "$0" -c "$1" attach 2>"$2"'
    done = launch("sh", "-c", script, python("")[0], PROGRAM, str(own))
    assert done.returncode == 0, done.stderr
    text = own.read_bytes()
    assert b"\x1b_" not in text and text.count(b"INFO logged") == 200
    assert records(launch) == WANTED
