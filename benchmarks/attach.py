"""What our hook adds to the start of an actor, next to the same actor with a runtime_env of one variable, and with none.

Three drivers stay connected to one cluster and start an actor each in turn, so that whatever else the machine does falls
on all three alike.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("ours", "runtime_env", "none")

CLUSTER = """
import sys, ray
ray.init(num_cpus=8, include_dashboard=False, configure_logging=False, _temp_dir=sys.argv[1])
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""

# The hook that is timed calls ours; it is shipped as the package is.
TIMED_HOOK = """
import os, sys, time
def hook():
    before = set(sys.modules)
    began, cpu = time.perf_counter(), time.thread_time()
    from skyrl_otel.integrations.ray import setup_worker
    setup_worker()
    os.environ["BENCH_HOOK_CPU_MS"] = str((time.thread_time() - cpu) * 1000)
    os.environ["BENCH_HOOK_MS"] = str((time.perf_counter() - began) * 1000)
    os.environ["BENCH_NEW_MODULES"] = ",".join(sorted(set(sys.modules) - before))
"""

DRIVER = """
import json, os, sys, time
kind, hooks = sys.argv[1:]
import ray
if kind == "ours":
    # What runtime_env() makes, without the wrapped ray.init, which would chain the timed hook behind ours.
    from skyrl_otel.config import Config
    from skyrl_otel.integrations.ray import driver, merge
    env = merge.merged(None, driver._addition(Config.from_env()))
    env["worker_process_setup_hook"] = "timed_hook.hook"
    env["py_modules"] = [*env["py_modules"], hooks]
else:
    env = {"env_vars": {"BENCH": "1"}} if kind == "runtime_env" else None
ray.init(runtime_env=env, configure_logging=False, log_to_driver=False)

@ray.remote(num_cpus=0)
class Actor:
    def ping(self):
        found = [os.environ.get(f"BENCH_{name}", "") for name in ("HOOK_MS", "NEW_MODULES", "HOOK_CPU_MS")]
        return *found, type(sys.stdout).__name__

for line in sys.stdin:
    began = time.perf_counter()
    actor = Actor.remote()
    answer = ray.get(actor.ping.remote())
    took = (time.perf_counter() - began) * 1000
    ray.kill(actor)
    print(json.dumps([took, *answer]), flush=True)
"""


def run(quick: bool) -> dict[str, object]:
    """Measure; `quick` takes fewer rounds. A round starts one actor of each kind."""
    rounds = 3 if quick else 15
    with tempfile.TemporaryDirectory(prefix="sk-attach-", dir="/var/tmp", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        hooks = root / "timed_hook.py"
        hooks.write_text(TIMED_HOOK)
        base = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "SKYRL_", "RAY_"))}
        base.pop("PYTHONDONTWRITEBYTECODE", None)  # else each worker compiles us anew, and Ray and itself too
        base |= {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
        cluster = _start(CLUSTER, [str(root / "ray")], base)
        drivers: dict[str, subprocess.Popen[str]] = {}
        try:
            base["RAY_ADDRESS"] = _line(cluster)
            (root / "spool").mkdir(mode=0o700)
            ours = {**base, "SKYRL_OTEL_RUN_ID": "bench", "SKYRL_OTEL_SPOOL_DIR": str(root / "spool")}
            for kind in KINDS:
                drivers[kind] = _start(DRIVER, [kind, str(hooks)], ours if kind == "ours" else base)
            answers: dict[str, list[Any]] = {kind: [] for kind in KINDS}
            for kind in KINDS:
                _ask(drivers[kind])  # the first start also fetches the package to the node
            for number in range(rounds):
                for kind in KINDS[:: 1 if number % 2 else -1]:
                    answers[kind].append(_ask(drivers[kind]))
        finally:
            for process in (*drivers.values(), cluster):
                assert process.stdin and process.stdout
                process.stdin.close()
            for process in (*drivers.values(), cluster):
                process.wait(60)
    assert answers["ours"][-1][4] == "LineStream", "the hook did not run"
    starts = {kind: median(answer[0] for answer in answers[kind]) for kind in KINDS}
    new_modules = answers["ours"][-1][2].split(",")
    return {
        "added_ms": round(median(float(answer[1]) for answer in answers["ours"]), 2),
        "added_cpu_ms": round(median(float(answer[3]) for answer in answers["ours"]), 2),
        "start_difference_ms": round(starts["ours"] - starts["runtime_env"], 1),
        "added_ms_no_runtime_env": round(starts["ours"] - starts["none"], 1),
        **{f"start_ms_{kind}": round(value, 1) for kind, value in starts.items()},
        "modules_of_ours": [name for name in new_modules if name.partition(".")[0] == "skyrl_otel"],
        "other_modules": [name for name in new_modules if name.partition(".")[0] != "skyrl_otel"],
        "rounds": rounds,
    }


def _start(script: str, arguments: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if not line.startswith(("(", "\n", "\x1b")):  # Ray's own words in the driver
            return line.strip()
    raise RuntimeError(f"{process.args!r} ended with {process.wait()}")


def _ask(driver: subprocess.Popen[str]) -> Any:
    assert driver.stdin is not None
    driver.stdin.write("go\n")
    driver.stdin.flush()
    return json.loads(_line(driver))
