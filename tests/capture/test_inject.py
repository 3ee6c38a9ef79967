"""The sitecustomize that runs in every Python process under `skyrl-otel run`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.capture.conftest import ROOT, Host, environment, written
from tests.capture.frames import taken


@pytest.fixture
def lib(tmp_path: Path) -> Path:
    """As the launcher lays it out: our package and the sitecustomize side by side."""
    made = tmp_path / "lib"
    shutil.copytree(ROOT / "skyrl_otel", made / "skyrl_otel", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "skyrl_otel/capture/inject/sitecustomize.py", made)
    return made


def run(lib: Path, spool: Path, script: str, *path: Path, argv: tuple[str, ...] = (), **env: str) -> str:
    variables = environment(spool, SKYRL_OTEL_LAUNCHER="1", **env)
    variables["PYTHONPATH"] = os.pathsep.join(map(str, (lib, *path)))
    command = [sys.executable, *(argv or ("-c", script))]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_imports_nothing_of_ours_into_a_program_that_logs_nothing(lib: Path, spool: Path) -> None:
    script = (
        "import sys; print([name for name in sys.modules if name.startswith('skyrl_otel')], 'typing' in sys.modules)"
    )
    assert run(lib, spool, script) == "[] False\n"
    script = "import logging; logging.getLogger().debug('below its level');" + script
    assert run(lib, spool, script) == "[] False\n"
    assert written(spool) == []


def test_logging_looks_as_ever_once_it_is_imported(lib: Path, spool: Path) -> None:
    script = """
import logging
assert type(logging.__spec__.loader).__name__ == "SourceFileLoader" and not vars(logging.__loader__).get("exec_module")
assert logging.getLogger("x").filter(logging.LogRecord("x", 20, "path", 1, "asked by hand", (), None))
import skyrl_otel; skyrl_otel.detach()
assert "filter" not in vars(logging.Logger)
"""
    assert run(lib, spool, script) == ""


def test_where_nothing_is_recorded_logging_is_left_alone(lib: Path, spool: Path) -> None:
    script = "import logging; logging.warning('seen'); print('filter' in vars(logging.Logger))"
    assert run(lib, spool, script, SKYRL_OTEL_CAPTURE="off") == "False\n"
    spool.chmod(0o755)  # a spool that is refused
    assert run(lib, spool, script) == "False\n"


def test_a_record_within_our_own_imports_waits_for_nothing(lib: Path, spool: Path) -> None:
    script = """
import logging, signal, sys, threading
class Noisy:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("skyrl_otel"):
            logging.warning("within")
sys.meta_path.insert(0, Noisy())
logging.warning("first")
"""
    run(lib, spool, script)
    bodies = [record.body for folder in written(spool) for record in taken(folder.path)]
    assert bodies.count("first") == 1 and set(bodies) <= {"first", "within"}


def test_the_next_sitecustomize_runs_too_and_its_error_is_its_own(lib: Path, spool: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "sitecustomize.py").write_text("import builtins; builtins.chained = True")
    script = "import sitecustomize; print(chained, sitecustomize.__file__)"
    assert run(lib, spool, script, other) == f"True {other}/sitecustomize.py\n"


def test_rank_0_keeps_the_terminal_and_the_others_are_redirected(lib: Path, spool: Path) -> None:
    script = "print('from a rank'); import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1)'])"
    assert run(lib, spool, script, RANK="0", WORLD_SIZE="2") == "from a rank\n1\n"
    assert written(spool) == []
    assert run(lib, spool, script, RANK="1", WORLD_SIZE="2") == ""
    [folder] = written(spool)
    assert folder.text() == b"from a rank\n1\n"
    assert (folder.facts["rank"], folder.facts["world_size"], folder.facts["channel"]) == (1, 2, "infra")


GRANDCHILD = "import logging; logging.warning('grandchild')"
CHILD = f"""
import logging, subprocess, sys
logging.basicConfig(level="INFO"); logging.getLogger("lib.child").info("step %d", 3, extra={{"step": 3}})
logging.getLogger("lib").warning("by another logger"); print("printed by a child", flush=True)
from loguru import logger; logger.info("by loguru")
subprocess.run([sys.executable, "-c", {GRANDCHILD!r}])
"""


def test_children_of_a_rank_have_records_of_their_own_and_no_echo(lib: Path, spool: Path) -> None:
    """And children of children. What they print is the rank's."""
    script = f"""
import logging, subprocess, sys
logging.basicConfig(level="INFO"); logging.getLogger("rank").info("the rank's")
subprocess.run([sys.executable, "-c", {CHILD!r}], check=True)
"""
    assert run(lib, spool, script, RANK="1", WORLD_SIZE="2") == ""
    folders = written(spool)
    scopes = [sorted((record.scope, record.body) for record in taken(folder.path)) for folder in folders]
    assert sorted(scopes) == [
        [("__main__", "by loguru"), ("lib", "by another logger"), ("lib.child", "step 3")],
        [("rank", "the rank's")],
        [("root", "grandchild")],
    ]
    [rank] = [folder for folder in folders if (folder.path / "out").exists()]
    assert rank.text() == b"printed by a child\n" and rank.text("err") == b""
    for folder in folders:
        assert (folder.facts["rank"], folder.facts["channel"], folder.facts["role"]) == (1, "infra", "trainer")
        assert bool(folder.facts.get("silent_end")) == (folder is not rank), "the rank's end is told once"


def test_a_child_of_rank_0_does_not_end_for_it(lib: Path, spool: Path) -> None:
    child = "import logging; logging.warning('child')"
    script = f"import logging, subprocess, sys; logging.warning(1); subprocess.run([sys.executable, '-c', {child!r}])"
    run(lib, spool, script, RANK="0", WORLD_SIZE="2")
    ends = {taken(folder.path)[0].body: folder.facts["silent_end"] for folder in written(spool)}
    assert ends == {"1": False, "child": True}


def test_attach_in_a_child_of_a_redirected_process_follows_nothing(host: Host, spool: Path) -> None:
    """Its output is in the spool already, in its parent's folder."""
    child = "import skyrl_otel; skyrl_otel.attach(); import logging; logging.basicConfig(); logging.error(2); print('printed')"
    host(
        f"""
import skyrl_otel; skyrl_otel.attach(role="policy", channel="infra")
import subprocess, sys; subprocess.run([sys.executable, "-c", {child!r}], check=True)
"""
    )
    parent, other = sorted(written(spool), key=lambda folder: not (folder.path / "out").exists())
    assert parent.text() == b"printed\n" and parent.text("err") == b""
    assert "follow" not in other.facts and [record.body for record in taken(other.path)] == ["2"]


def test_all_ranks_stay_on_the_terminal_when_infra_is_shown(lib: Path, spool: Path) -> None:
    assert run(lib, spool, "print('shown')", RANK="1", SKYRL_LOG_LEVEL="DEBUG") == "shown\n"


def test_rays_own_processes_are_left_alone(lib: Path, spool: Path, tmp_path: Path) -> None:
    program = tmp_path / "ray" / "_private" / "workers" / "default_worker.py"
    program.parent.mkdir(parents=True)
    program.write_text(
        "import sys; print([type(f).__name__ for f in sys.meta_path], getattr(sys.meta_path[0], '__name__', ''))"
    )
    assert "_Before" not in run(lib, spool, "", argv=(str(program),), RANK="1")
    assert written(spool) == []


def test_ray_init_is_wrapped_once_ray_is_imported(lib: Path, spool: Path, tmp_path: Path) -> None:
    script = "import ray; print(hasattr(ray.init, '__skyrl_otel__'), type(ray.__spec__.loader).__name__)"
    assert run(lib, spool, script) == "True SourceFileLoader\n"


def test_a_terminal_descriptor_that_is_not_there_is_forgotten(lib: Path, spool: Path) -> None:
    script = "import os; print(os.environ.get('SKYRL_OTEL_TERMINAL_FD'))"
    assert run(lib, spool, script, SKYRL_OTEL_TERMINAL_FD="77") == "None\n"
    assert run(lib, spool, script, SKYRL_OTEL_TERMINAL_FD="1") == "1\n"


@pytest.mark.slow
def test_torchrun_on_one_node(lib: Path, spool: Path, tmp_path: Path) -> None:
    program = tmp_path / "train.py"
    program.write_text(
        "import torch.distributed as d\n"
        "d.init_process_group('gloo'); print('rank', d.get_rank(), 'of', d.get_world_size())\n"
        "d.barrier(); d.destroy_process_group()\n"  # gloo fails in who still connects to a rank that has ended
    )
    argv = ("-m", "torch.distributed.run", "--nproc-per-node", "3", str(program))
    assert run(lib, spool, "", argv=argv) == "rank 0 of 3\n"
    ranks = [w for w in written(spool) if w.facts.get("rank")]  # not rank 0, nor torchrun, which may log
    found = {w.facts["rank"]: (w.text(), w.facts["world_size"], w.facts["role"]) for w in ranks}
    assert found == {n: (f"rank {n} of 3\n".encode(), 3, "trainer") for n in (1, 2)}
