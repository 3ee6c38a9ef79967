"""The package that users install, rather than the tree that we edit.

Our package travels with the job to nodes whose environment is not ours, so the rooms that run there must
import with the standard library alone.
"""

import json
import subprocess
import zipfile
from pathlib import Path

import pytest

TREE = Path(__file__).parent.parent
UV = TREE / ".venv/bin/uv"
BUILD_PYTHON = TREE / ".venv/bin/python"
SHIPPED_ROOMS = ("skyrl_otel", "skyrl_otel.config", "skyrl_otel.spool", "skyrl_otel.capture", "skyrl_otel.agent")

IMPORT_EVERYTHING = """
import importlib, json, pkgutil, sys
rooms, site = sys.argv[1:-1], sys.argv[-1]
sys.path.insert(0, site)
for room in rooms:
    module = importlib.import_module(room)
    if room != "skyrl_otel":
        for found in pkgutil.walk_packages(getattr(module, "__path__", ()), room + "."):
            if not found.name.endswith("__main__"):
                importlib.import_module(found.name)
roots = {name.partition(".")[0] for name in sys.modules}
print(json.dumps(sorted(roots - set(sys.stdlib_module_names) - {"__main__", "__mp_main__", "skyrl_otel"})))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    _run(BUILD_PYTHON, "-m", "hatchling", "build", "-t", "wheel", "-d", out, cwd=TREE)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel in it and none of its dependencies."""
    environment = tmp_path_factory.mktemp("venv")
    _run(UV, "venv", "--quiet", "--allow-existing", "--python", BUILD_PYTHON, environment)
    _run(UV, "pip", "install", "--quiet", "--offline", "--no-deps", "--python", environment / "bin/python", wheel)
    return environment


def test_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    tracked = _run("git", "ls-files", "skyrl_otel", cwd=TREE).splitlines()
    assert set(tracked) <= set(zipfile.ZipFile(wheel).namelist())
    assert "skyrl_otel/py.typed" in tracked


def test_wheel_holds_nothing_but_the_package_and_its_metadata(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {"skyrl_otel", "skyrl_otel-0.1.0.dist-info"}


def test_what_runs_in_the_training_process_needs_the_standard_library_only(environment: Path) -> None:
    """Every module of these rooms, in an isolated interpreter without site: no third-party root is loaded."""
    (site,) = environment.glob("lib/python*/site-packages")
    foreign = _run(environment / "bin/python", "-I", "-S", "-c", IMPORT_EVERYTHING, *SHIPPED_ROOMS, site)
    assert json.loads(foreign) == []


def test_the_command_is_installed(environment: Path) -> None:
    assert (environment / "bin/skyrl-otel").exists()


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run([*map(str, command)], cwd=cwd, text=True, capture_output=True)
    assert done.returncode == 0, f"{command[0]} exited with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout
