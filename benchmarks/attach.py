"""What our hook adds to the start of an actor, next to the same actor under a hook that does nothing.

`added_ms` is the time from the hook's first line to the first line of the actor's `__init__`, less what passes there with
an empty hook. So it holds the hook itself, imports included (`hook_ms`), and `after_hook_ms`: what Ray's actor marker costs
(a folder in the spool, dup2, identity) and whatever our watch thread takes from the main thread meanwhile. `added_cpu_ms` is
the same in CPU time of the main thread, `background_cpu_ms` that of our own threads half a second after the start. Our
threads work on while `__init__` runs: `first_work_ms` is by how much they hold up 100 ms of plain Python there.

As in a run, the node's agent is there already and has a receiver. The drivers stay connected to one cluster and start an
actor each in turn, in an order that changes, and each after the last one's process is gone, so that whatever else the
machine does falls on all alike. All figures are medians of the differences within a round; `…_quartiles_ms` are the first
and third quartile of the same differences.

`start_difference_ms` is the literal reading: by how much a driver waits longer for its actor than one with a runtime_env of
one variable. Read it with its quartiles. A start is a second of Ray's own imports, and two starts without us differ by more
than 100 ms; a few dozen pairs cannot tell 30 ms from none, which is why `added_ms` looks at the part in which we are.
`start_ms_*` are the medians of each kind's own starts.

Beside it, what a plain process pays: for `attach()`, and for being started under `skyrl-otel run` without ever attaching.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from itertools import permutations
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.fd import RECEIVER
from skyrl_otel.spool import layout, token

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("ours", "empty_hook", "runtime_env", "none")

CLUSTER = """
import sys, ray
ray.init(num_cpus=8, include_dashboard=False, configure_logging=False, _temp_dir=sys.argv[1])
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""

# The hooks that are timed; ours is called by one of them, which is shipped as the package is.
TIMED_HOOKS = """
import sys, time

class Timed:
    began = ended = cpu = 0.0
    modules = []

def ours():
    before = set(sys.modules)
    Timed.began, Timed.cpu = time.perf_counter(), time.thread_time()
    from skyrl_otel.integrations.ray import setup_worker
    setup_worker()
    Timed.ended = time.perf_counter()
    Timed.modules = sorted(set(sys.modules) - before)

def empty_hook():
    Timed.began, Timed.cpu = time.perf_counter(), time.thread_time()
    Timed.ended = time.perf_counter()
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
else:
    env = {"env_vars": {"BENCH": "1"}} if kind != "none" else None
if kind in ("ours", "empty_hook"):
    env["worker_process_setup_hook"] = f"timed_hooks.{kind}"
    env["py_modules"] = [*env.get("py_modules", []), hooks]
ray.init(runtime_env=env, configure_logging=False, log_to_driver=False)

@ray.remote(num_cpus=0)
class Actor:
    def __init__(self):
        self.began, self.cpu = time.perf_counter(), time.thread_time()
        while time.thread_time() < self.cpu + 0.1:
            sum(range(1000))
        self.worked = time.perf_counter()

    def ping(self):
        timed = getattr(sys.modules.get("timed_hooks"), "Timed", None)
        if timed is None:
            return {}
        return {
            "hook_ms": (timed.ended - timed.began) * 1000,
            "after_hook_ms": (self.began - timed.ended) * 1000,
            "first_work_ms": (self.worked - self.began) * 1000,
            "cpu_ms": (self.cpu - timed.cpu) * 1000,
            "modules": timed.modules,
            "stream": type(sys.stdout).__name__,
        }

    def pid(self):
        return os.getpid()

    def background_cpu_ms(self):
        import threading
        time.sleep(0.4)
        ours = [thread for thread in threading.enumerate() if thread.name.startswith("skyrl-otel")]
        return sum(time.clock_gettime(time.pthread_getcpuclockid(thread.ident)) for thread in ours) * 1000

for line in sys.stdin:
    began = time.perf_counter()
    actor = Actor.remote()
    answer = ray.get(actor.ping.remote())
    answer["start_ms"] = (time.perf_counter() - began) * 1000
    if kind == "ours":
        answer["background_cpu_ms"] = ray.get(actor.background_cpu_ms.remote())
    worker = f"/proc/{ray.get(actor.pid.remote())}"
    ray.kill(actor)
    while os.path.exists(worker):  # or its end would fall into the next one's start
        time.sleep(0.01)
    print(json.dumps(answer), flush=True)
"""

ATTACH = """
import sys, time
began = time.thread_time()
import skyrl_otel
skyrl_otel.attach(channel="infra")
open(sys.argv[1], "w").write(str((time.thread_time() - began) * 1000))
"""


def run(quick: bool) -> dict[str, object]:
    """Measure; `quick` takes fewer rounds. A round starts one actor of each kind and the plain processes."""
    rounds = 3 if quick else 20
    with tempfile.TemporaryDirectory(prefix="sk-attach-", dir="/var/tmp", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        base = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "SKYRL_", "RAY_"))}
        base.pop("PYTHONDONTWRITEBYTECODE", None)  # else each worker compiles us anew, and Ray and itself too
        base |= {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
        ours = {**base, "SKYRL_OTEL_RUN_ID": "bench", "SKYRL_OTEL_SPOOL_DIR": str(root / "spool")}
        receiver = subprocess.Popen([sys.executable, "-c", RECEIVER], stdout=subprocess.PIPE, text=True)
        try:
            assert receiver.stdout is not None
            url = f"http://127.0.0.1:{receiver.stdout.readline().strip()}/v1/logs"
            token.write(layout.open_run(root / "spool", "bench"), token.Shipping(url, {}))
            actors = _actors(root, base, ours, rounds)
            plain = _plain(root, base, ours, rounds)
        finally:
            receiver.kill()
            receiver.wait()
    assert actors["ours"][-1]["stream"] == "LineStream", "the hook did not run"

    def of_ours(key: str) -> float:
        return round(float(median(answer[key] for answer in actors["ours"])), 2)

    # What came before the hook's first line is no part of it; what came after it, hook included, is `added_ms`.
    for answer in (*actors["ours"], *actors["empty_hook"]):
        answer["to_init_ms"] = answer["hook_ms"] + answer["after_hook_ms"]
    added = _differences(actors, "to_init_ms", "empty_hook")
    waited = _differences(actors, "start_ms", "runtime_env")
    new_modules = actors["ours"][-1]["modules"]
    return {
        "added_ms": _middle(added),
        "added_quartiles_ms": _quartiles(added),
        "hook_ms": of_ours("hook_ms"),
        "after_hook_ms": _middle(_differences(actors, "after_hook_ms", "empty_hook")),
        "first_work_ms": _middle(_differences(actors, "first_work_ms", "empty_hook")),
        "added_cpu_ms": _middle(_differences(actors, "cpu_ms", "empty_hook")),
        "background_cpu_ms": of_ours("background_cpu_ms"),
        "start_difference_ms": _middle(waited),
        "start_difference_quartiles_ms": _quartiles(waited),
        "added_ms_no_runtime_env": _middle(_differences(actors, "start_ms", "none")),
        **{f"start_ms_{kind}": round(median(a["start_ms"] for a in actors[kind]), 1) for kind in KINDS},
        **plain,
        "modules_of_ours": [name for name in new_modules if name.partition(".")[0] == "skyrl_otel"],
        "other_modules": [name for name in new_modules if name.partition(".")[0] != "skyrl_otel"],
        "rounds": rounds,
    }


def _differences(actors: dict[str, list[Any]], key: str, peer: str) -> list[float]:
    return [one[key] - other[key] for one, other in zip(actors["ours"], actors[peer], strict=True)]


def _middle(differences: list[float]) -> float:
    return round(median(differences), 2)


def _quartiles(differences: list[float]) -> list[float]:
    first, _, third = quantiles(differences, n=4)
    return [round(first, 2), round(third, 2)]


def _actors(root: Path, base: dict[str, str], ours: dict[str, str], rounds: int) -> dict[str, list[Any]]:
    """What the actors of each kind answered."""
    hooks = root / "timed_hooks.py"
    hooks.write_text(TIMED_HOOKS)
    cluster = _start(CLUSTER, [str(root / "ray")], base)
    drivers: dict[str, subprocess.Popen[str]] = {}
    try:
        address = {"RAY_ADDRESS": _line(cluster)}
        for kind in KINDS:
            drivers[kind] = _start(DRIVER, [kind, str(hooks)], (ours if kind == "ours" else base) | address)
        answers: dict[str, list[Any]] = {kind: [] for kind in KINDS}
        for kind in KINDS:
            _ask(drivers[kind])  # the first start also fetches the package to the node
        orders = list(permutations(KINDS))
        for number in range(rounds):
            # 7 and 24 share no factor: no order comes twice, and each kind comes at each place.
            for kind in orders[number * 7 % len(orders)]:
                answers[kind].append(_ask(drivers[kind]))
    finally:
        for process in (*drivers.values(), cluster):
            assert process.stdin and process.stdout
            process.stdin.close()
        for process in (*drivers.values(), cluster):
            process.wait(60)
    return answers


def _plain(root: Path, base: dict[str, str], ours: dict[str, str], rounds: int) -> dict[str, float]:
    """CPU time of `attach()` without Ray, and what the launcher's `sitecustomize` adds to a process that never attaches."""
    inject = ROOT / "skyrl_otel" / "capture" / "inject"
    injected = base | {"PYTHONPATH": f"{inject}:{ROOT}", "SKYRL_OTEL_LAUNCHER": "1"}
    said = root / "attach_ms"
    attach, bare, under_run = [], [], []
    for _ in range(rounds):
        _cpu_ms(ATTACH, ours, str(said))
        attach.append(float(said.read_text()))
        bare.append(_cpu_ms("", base))
        under_run.append(_cpu_ms("", injected))
    return {
        "plain_attach_cpu_ms": round(median(attach), 2),
        "plain_injected_cpu_ms": round(median(under_run) - median(bare), 2),
    }


def _cpu_ms(script: str, env: dict[str, str], *arguments: str) -> float:
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], env=env, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return (usage.ru_utime + usage.ru_stime) * 1000


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
