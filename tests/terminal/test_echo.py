"""Under `run`: what a console handler prints stands on the screen where it stood without us, and is recorded as a record."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.capture.conftest import written
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


attached = pytest.mark.parametrize("word", [(), ("attach",)], ids=["zero edits", "attach"])


@attached
def test_on_a_terminal_every_byte_stays_where_it_was(launch: Launcher, word: tuple[str, ...]) -> None:
    bare = launch.terminal(*python(PROGRAM), bare=True)
    bare.finish()
    terminal = launch.terminal(*python(PROGRAM), *word)
    assert os.WEXITSTATUS(terminal.finish()) == 0, terminal.output[-500:]
    assert terminal.output.startswith(bare.output), "the launcher's own words come behind"
    assert records(launch) == WANTED
    recorded = launch.recorded().replace(b"\r\n", b"\n").decode().splitlines()
    assert recorded == [*(f"printed {number}" for number in range(200)), "done"]


@attached
def test_in_pipes_each_stream_keeps_its_own(launch: Launcher, word: tuple[str, ...]) -> None:
    bare = subprocess.run(python(PROGRAM), env=launch.env, capture_output=True, check=True)
    done = launch(*python(PROGRAM), *word)
    assert done.stdout == bare.stdout and done.stderr.startswith(bare.stderr)
    assert records(launch) == WANTED
    assert launch.recorded("err") == b"" and launch.recorded().count(b"\n") == 201


BY_NAME = """
import logging
log = logging.getLogger("app"); log.setLevel(20)
for name in ("/dev/stderr", "/dev/stdout"): log.addHandler(logging.FileHandler(name))
for number in range(50):
    log.info("logged %d", number)
    print("printed", number, flush=True)
"""


def test_a_console_by_its_name_is_one(launch: Launcher) -> None:
    bare = launch.terminal(*python(BY_NAME), bare=True)
    bare.finish()
    terminal = launch.terminal(*python(BY_NAME))
    assert os.WEXITSTATUS(terminal.finish()) == 0, terminal.output[-500:]
    assert terminal.output.startswith(bare.output)
    assert records(launch) == [f"logged {number}" for number in range(50)]
    recorded = launch.recorded().replace(b"\r\n", b"\n").decode().splitlines()
    assert recorded == [f"printed {number}" for number in range(50)]


@attached
def test_what_is_redirected_within_the_command_is_left_alone(
    launch: Launcher, tmp_path: Path, word: tuple[str, ...]
) -> None:
    own = tmp_path / "own.log"
    script = 'exec "$0" -c "$1" $3 2>"$2"'
    done = launch("sh", "-c", script, python("")[0], PROGRAM, str(own), *word)
    assert done.returncode == 0, done.stderr
    text = own.read_bytes()
    assert b"\x1b_" not in text and text.count(b"INFO logged") == 200
    assert records(launch) == WANTED


PLAIN = """
import logging, sys
logging.getLogger("app").warning("by lastResort")
logging.basicConfig(level="INFO", stream=sys.stdout, format="%(filename)s:%(lineno)d %(funcName)s %(message)s")
logging.info("with extra", extra={"step": 3})
print("printed")
"""


def test_extras_need_no_edit(launch: Launcher) -> None:
    bare = subprocess.run(python(PLAIN), env=launch.env, capture_output=True, check=True)
    done = launch(*python(PLAIN))
    assert done.stdout == bare.stdout and done.stderr.startswith(bare.stderr)
    [folder] = [folder for _, folder in launch.run_dir.writers() if taken(folder)]
    assert [(r.body, r.attributes.get("step")) for r in taken(folder)] == [("by lastResort", None), ("with extra", 3)]
    assert launch.recorded() == b"printed\n" and launch.recorded("err") == b""


def test_loguru_alone_needs_no_edit(launch: Launcher) -> None:
    program = "from loguru import logger; logger.bind(step=4).info('by loguru'); print('printed')"
    done = launch(*python(program))
    assert b"by loguru" in done.stderr
    assert records(launch) == ["by loguru"]
    assert launch.recorded() == b"printed\n" and launch.recorded("err") == b""


def test_each_process_of_a_command_has_its_records(launch: Launcher) -> None:
    program = """
import logging, multiprocessing, subprocess, sys
def work(name):
    logging.warning("in %s", name)
if __name__ == "__main__":
    child = multiprocessing.get_context("fork").Process(target=work, args=("a fork before the first record",))
    child.start(); child.join()
    work("the command")
    child = multiprocessing.get_context("fork").Process(target=work, args=("a fork",))
    child.start(); child.join()
    subprocess.run([sys.executable, "-c", "import logging; logging.warning('in a child')"])
"""
    done = launch(*python(program))
    wanted = ["in a fork before the first record", "in the command", "in a fork", "in a child"]
    assert done.stderr.splitlines()[:4] == [f"WARNING:root:{body}".encode() for body in wanted]
    assert sorted(records(launch)) == sorted(wanted)
    assert launch.recorded("err") == b""


def test_the_first_records_of_many_threads_are_taken(launch: Launcher) -> None:
    program = """
import logging, threading
logging.basicConfig(level="INFO")
gate = threading.Barrier(16)
def work(number):
    gate.wait(); logging.info("first of %d", number); logging.info("second of %d", number)
threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
"""
    done = launch(*python(program))
    assert done.stderr.count(b"INFO:root:first of") == 16
    assert sorted(records(launch)) == sorted(f"{which} of {n}" for n in range(16) for which in ("first", "second"))
    assert launch.recorded("err") == b""


@pytest.mark.slow
def test_rank_0_of_torchrun_has_its_records_and_stays_on_the_terminal(launch: Launcher) -> None:
    program = launch.cwd / "train.py"
    program.write_text("import logging, os; logging.warning('rank %s', os.environ['RANK'])")
    done = launch(*python("")[:1], "-m", "torch.distributed.run", "--nproc-per-node", "2", str(program))
    assert done.stderr.count(b"WARNING:root:rank 0\n") == 1 and b"rank 1" not in done.stderr
    ranks = [w for w in written(launch.root, launch.run_dir.run_id) if "rank" in w.facts]
    found = {w.facts["rank"]: [r.body for r in taken(w.path)] for w in ranks}
    assert found == {0: ["rank 0"], 1: ["rank 1"]}
    assert b"WARNING:root:rank" not in launch.recorded("err")
