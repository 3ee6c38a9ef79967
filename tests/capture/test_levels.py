"""`SKYRL_OTEL_LEVELS`: the longest name that holds decides, for each record of each process that is recorded."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from skyrl_otel.capture.levels import Levels
from tests.capture.conftest import Host, written
from tests.capture.frames import taken

parts = st.sampled_from(["a", "b", "ab"])
names = st.lists(parts, min_size=1, max_size=4).map(".".join)


@given(st.dictionaries(names | st.just(""), st.integers(0, 60), max_size=5), names, st.integers(0, 60))
def test_the_longest_name_that_holds_decides(lowest: dict[str, int], name: str, level: int) -> None:
    holding = [known for known in lowest if known in ("", name) or name.startswith(known + ".")]
    longest = max(holding, key=len, default=None)
    assert Levels(lowest).takes(name, level) == (longest is None or level >= lowest[longest])


def bodies(spool: Path) -> list[str]:
    return sorted(record.body for folder in written(spool) for record in taken(folder.path))


CHILDREN = """
import logging, multiprocessing, os, subprocess, sys
SAYS = '''
import logging
for name in ("vllm.engine", "ray.data", "mine"):
    logging.getLogger(name).setLevel(1)
    for level in (5, 10, 20, 30, 40):
        logging.getLogger(name).log(level, "%s %s %d", who, name, level)
'''
ATTACH = "import skyrl_otel; skyrl_otel.attach(role='policy', rank=3, channel='infra'); who = {!r}\\n"
exec(ATTACH.format("parent") + SAYS)
pid = os.fork()
if pid == 0:
    who = "forked"
    exec(SAYS)
    os._exit(0)
os.waitpid(pid, 0)
subprocess.run([sys.executable, "-c", ATTACH.format("own") + SAYS], check=True)
"""


def test_levels_hold_in_children_too(host: Host, spool: Path) -> None:
    host(CHILDREN, env={"SKYRL_OTEL_LEVELS": "INFO,vllm=ERROR,ray=DEBUG"})
    kept = ("vllm.engine 40", *(f"ray.data {n}" for n in (10, 20, 30, 40)), *(f"mine {n}" for n in (20, 30, 40)))
    assert bodies(spool) == sorted(f"{who} {what}" for who in ("parent", "forked", "own") for what in kept)


def test_levels_hold_for_a_handler_alone(host: Host, spool: Path) -> None:
    host(
        """
import logging, skyrl_otel
log = logging.getLogger("mine.deep"); log.setLevel(1); log.addHandler(skyrl_otel.OTelLogHandler(level=20))
for level in (10, 20, 30, 40):
    log.log(level, "%d", level)
""",
        env={"SKYRL_OTEL_LEVELS": "mine=WARNING"},
    )
    assert bodies(spool) == ["30", "40"]


def test_a_level_that_is_none_is_one_line_and_all_is_recorded(host: Host, spool: Path) -> None:
    done = host(
        """
import skyrl_otel; skyrl_otel.attach(channel="progress")
import logging
logging.getLogger("vllm").setLevel(1); logging.getLogger("vllm").info("kept")
""",
        env={"SKYRL_OTEL_LEVELS": "vllm=LOUD"},
    )
    assert done.stderr.count(b"SKYRL_OTEL_LEVELS='vllm=LOUD' has the level 'LOUD'") == 1
    assert bodies(spool) == ["kept"]
