"""Two users on one node at once: each has a run of their own, and neither can read the other's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
UIDS = (12001, 12002)

# Another user may not reach the interpreter and the checkout of the one who tests: they are bound to a place that all reach.
IN_A_NAMESPACE = """
set -e
mount --make-rprivate /
for name in base site repo; do mkdir "$1/$name"; done
mount --bind "$2" "$1/base"; mount --bind "$3" "$1/site"; mount --bind "$4" "$1/repo"
exec setpriv --reuid="$5" --regid="$5" --clear-groups "$1/base/bin/$6" -c "$7" "$8"
"""

LAUNCH = """
import os, sys
from skyrl_otel.terminal.run import main
code = "import os, time; print('who', os.getuid(), flush=True); time.sleep(3)"
sys.exit(main([sys.executable, "-c", code], log_dir=sys.argv[1]))
"""


@pytest.fixture
def places() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="sk-two-", dir="/var/tmp"))
    root.chmod(0o755)
    yield root
    for uid in UIDS:
        shutil.rmtree(f"/var/tmp/skyrl-otel-{uid}", ignore_errors=True)
    shutil.rmtree(root, ignore_errors=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_two_users_on_one_node(places: Path) -> None:
    running = []
    for uid in UIDS:
        logs = places / f"logs-{uid}"
        logs.mkdir(mode=0o700)
        os.chown(logs, uid, uid)
        bound = places / f"bound-{uid}"
        bound.mkdir(mode=0o755)
        python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        arguments = [bound, sys.base_prefix, sysconfig.get_path("purelib"), REPO, uid, python, LAUNCH, logs]
        env = {
            "PATH": os.environ["PATH"],
            "HOME": str(logs),
            "LD_LIBRARY_PATH": f"{bound}/base/lib",  # libpython, where the interpreter has it apart
            "PYTHONPATH": f"{bound}/repo:{bound}/site",
            "PYTHONDONTWRITEBYTECODE": "1",
            "SKYRL_OTEL_NODE_IP": "127.0.0.1",
        }
        running.append(
            subprocess.Popen(
                ["unshare", "-m", "sh", "-c", IN_A_NAMESPACE, "sh", *map(str, arguments)],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd="/",
            )
        )
    for uid, process in zip(UIDS, running, strict=True):
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, f"who {uid}\n"), err
        spool = Path(f"/var/tmp/skyrl-otel-{uid}")
        assert (spool.stat().st_uid, spool.stat().st_mode & 0o777) == (uid, 0o700)
        text = "".join(path.read_text() for path in (places / f"logs-{uid}").glob("*.log"))
        assert f"who {uid}" in text, err
        assert all(f"who {other}" not in text for other in UIDS if other != uid)
        owners = {path.stat().st_uid for path in (places / f"logs-{uid}").iterdir()}
        assert owners == {uid}
