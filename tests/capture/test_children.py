"""Python processes that a redirected one starts anew: their text is its own, their records are theirs, with their loggers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.capture.conftest import Host, written
from tests.capture.frames import taken

PARENT = """
import multiprocessing, os, subprocess, sys
import skyrl_otel
skyrl_otel.attach(role="rollout", rank=3, channel="infra")
"""
SPEAKS = """
import logging, sys
logging.basicConfig(format="(EngineCore) %(message)s")
logging.getLogger("vllm.engine").warning("loaded %d", 7)
print("printed"); sys.stdout.flush()
"""


def test_a_spawned_child_has_records_of_its_own_and_no_echo(host: Host, spool: Path) -> None:
    host(
        f"""{PARENT}
child = multiprocessing.get_context("spawn").Process(target=exec, args=({SPEAKS!r}, {{}}), name="EngineCore_DP0")
child.start(); child.join(); assert child.exitcode == 0
"""
    )
    parent, child = sorted(written(spool), key=lambda folder: not (folder.path / "out").exists())
    assert (parent.text(), parent.text("err")) == (b"printed\n", b"")
    assert [(record.scope, record.body) for record in taken(child.path)] == [("vllm.engine", "loaded 7")]
    assert {key: child.facts.get(key) for key in ("role", "rank", "channel", "child", "parent", "silent_end")} == {
        "role": "rollout",
        "rank": 3,
        "channel": "infra",
        "child": "EngineCore_DP0",
        "parent": parent.path.name.removeprefix("w-"),
        "silent_end": True,
    }
    assert child.facts["parent_pid"] == parent.facts["pid"] != child.facts["pid"]


@pytest.mark.parametrize("reads", ["subprocess.PIPE", "subprocess.DEVNULL"])
def test_a_child_whose_output_goes_elsewhere_is_left_alone(host: Host, spool: Path, reads: str) -> None:
    host(
        f"""{PARENT}
done = subprocess.run([sys.executable, "-c", {SPEAKS!r}], stdout={reads}, stderr={reads}, check=True)
print(done.stdout, done.stderr)
"""
    )
    [parent] = written(spool)
    said = b"b'printed\\n' b'(EngineCore) loaded 7\\n'\n" if "PIPE" in reads else b"None None\n"
    assert parent.text() == said


def test_a_child_that_cannot_import_us_runs_as_ever(host: Host, spool: Path) -> None:
    host(
        f"""{PARENT}
env = {{**os.environ, "PYTHONPATH": os.environ["PYTHONPATH"].split(os.pathsep)[0]}}
env.pop("SKYRL_OTEL_RAISE")
code = "import os; os.chdir('/')\\n" + {SPEAKS!r}
subprocess.run([sys.executable, "-S", "-c", "import sitecustomize\\n" + code], env=env, check=True)
"""
    )
    [parent] = written(spool)
    assert (parent.text(), parent.text("err")) == (b"printed\n", b"(EngineCore) loaded 7\n")


def test_a_child_that_logs_nothing_imports_nothing_of_ours(host: Host, spool: Path) -> None:
    script = "import logging, sys; print([name for name in sys.modules if name.startswith('skyrl_otel')])"
    host(f"{PARENT}\nsubprocess.run([sys.executable, '-c', {script!r}], check=True)")
    [parent] = written(spool)
    assert parent.text() == b"[]\n"


def test_the_users_own_sitecustomize_runs_too(host: Host, spool: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('the user\\'s own')")
    host(
        f"""
import os
os.environ["PYTHONPATH"] = {str(tmp_path)!r} + os.pathsep + os.environ["PYTHONPATH"]
{PARENT}
subprocess.run([sys.executable, "-c", "print('child')"], check=True)
"""
    )
    [parent] = written(spool)
    assert parent.text() == b"the user's own\nchild\n"


def test_an_empty_entry_of_the_path_is_still_the_childs_folder(host: Host, spool: Path, tmp_path: Path) -> None:
    """As `PYTHONPATH=$PYTHONPATH:/mine` makes one where there was none."""
    (tmp_path / "below").mkdir()
    (tmp_path / "mine.py").write_text("print('found')")
    (tmp_path / "below" / "program.py").write_text("import mine")
    host(
        f"""
import os
os.environ["PYTHONPATH"] = os.pathsep + os.environ["PYTHONPATH"]
before = os.environ["PYTHONPATH"]
{PARENT}
subprocess.run([sys.executable, "below/program.py"], cwd={str(tmp_path)!r}, check=True)
skyrl_otel.detach()
assert os.environ["PYTHONPATH"] == before
"""
    )
    [parent] = written(spool)
    assert parent.text() == b"found\n"


def test_detach_gives_the_environment_back(host: Host, spool: Path) -> None:
    done = host(
        f"""
import os
before = dict(os.environ)
{PARENT}
during = dict(os.environ)
skyrl_otel.detach()
run = during.pop("SKYRL_OTEL_RUN_ID"), os.environ.pop("SKYRL_OTEL_RUN_ID"), before.pop("SKYRL_OTEL_RUN_ID")
changed = sorted(key for key in during if during[key] != before.get(key))
print(changed, dict(os.environ) == before)
"""
    )
    assert done.stdout == b"['PYTHONPATH', 'SKYRL_OTEL_CHILD_OF'] True\n"
