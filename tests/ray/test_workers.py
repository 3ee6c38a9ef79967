"""Who wrote what on a real cluster: actors of every kind, tasks, their children, and Ray's own files."""

import os
from pathlib import Path

import pytest

from tests.capture.frames import taken
from tests.ray.conftest import POINTER_TEXT, Cluster, Driver, Ran

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

HEAD = """
import json, os, sys, time, ray
ray.init()
"""


ACTORS = (
    HEAD
    + """
@ray.remote(num_cpus=0.1)
class Plain:
    def __init__(self): print("plain init"); print(":actor_name:Forged in init")
    def who(self):
        print(":actor_name:Forged"); print(":task_name:skyrl_entrypoint"); sys.stderr.write(":actor_name:Err\\n")
        print("plain method"); print("to stderr", file=sys.stderr); os.system("echo child; echo child-err >&2")
        context = ray.get_runtime_context()
        return [context.get_actor_id(), context.get_actor_name(), context.get_worker_id(), os.getpid()]

@ray.remote(num_cpus=0.1)
class Async:
    async def who(self):
        print("async method")
        return [ray.get_runtime_context().get_actor_id()]

@ray.remote(num_cpus=0.1, max_concurrency=4)
class Threaded:
    def who(self, n):
        for i in range(200): print("threaded", n, i)
        return [ray.get_runtime_context().get_actor_id()]
    def work_and_die(self):
        for i in range(5000): print("line", i)
        os.kill(os.getpid(), 9)

@ray.remote(num_cpus=0.1)
class PolicyWorker:
    def __init__(self, rank):
        print("before rank"); time.sleep(0.3)
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), "2"
        time.sleep(0.5); print("after rank")
        self.inner = Inner.remote()
    def __repr__(self): return "PolicyWorker(rank=1)"
    def who(self):
        print("policy method")
        return [ray.get_runtime_context().get_actor_id(), ray.get(self.inner.who.remote())]

@ray.remote(num_cpus=0.1)
class Inner:
    def who(self):
        print("nested actor")
        return ray.get_runtime_context().get_actor_id()

plain, asynchronous = Plain.options(name="by name").remote(), Async.remote()
threaded, policy = Threaded.remote(), PolicyWorker.remote(1)
found = {
    "plain": ray.get(plain.who.remote()), "async": ray.get(asynchronous.who.remote()),
    "threaded": ray.get([threaded.who.remote(n) for n in range(4)])[0], "policy": ray.get(policy.who.remote()),
    "job": ray.get_runtime_context().get_job_id(), "node": ray.get_runtime_context().get_node_id(),
}
try: ray.get(threaded.work_and_die.remote())
except ray.exceptions.RayActorError: pass
time.sleep(1)
print(json.dumps(found))
"""
)


@pytest.fixture(scope="module")
def actors(driver: Driver) -> Ran:
    return driver(ACTORS)


def test_identity_is_right_for_every_kind_of_actor(actors: Ran) -> None:
    told = actors.result()
    for name, key in (("by name", "plain"), ("Async", "async"), ("Threaded", "threaded"), ("PolicyWorker", "policy")):
        facts = actors.actor(name).facts
        assert facts["actor_id"] == told[key][0]
        assert (facts["job_id"], facts["node_id"], facts["channel"]) == (told["job"], told["node"], "infra")
    facts = actors.actor("by name").facts
    assert [facts[key] for key in ("actor_id", "actor_name", "worker_id", "pid")] == told["plain"]
    assert "actor_name" not in actors.actor("Async").facts
    assert actors.actor("Inner").facts["actor_id"] == told["policy"][1]
    assert actors.actor("Inner").text() == b"nested actor\n"


def test_an_actors_lines_and_those_of_its_children_are_whole(actors: Ran) -> None:
    plain = actors.actor("by name").text().splitlines()
    assert [line for line in plain if not line.startswith(b":")] == [b"plain init", b"plain method", b"child"]
    assert actors.actor("by name").text("err") == b":actor_name:Err\nto stderr\nchild-err\n"
    lines = actors.actor("Threaded").text().decode().splitlines()
    assert sorted(lines[:800]) == sorted(f"threaded {n} {i}" for n in range(4) for i in range(200))


def test_an_actor_killed_by_sigkill_loses_nothing(actors: Ran) -> None:
    killed = actors.actor("Threaded")
    assert killed.text().splitlines()[800:] == [f"line {i}".encode() for i in range(5000)]
    assert "goodbye" not in killed.facts
    [early] = actors.followed("Threaded")
    assert early.facts["silent_end"] and early.facts["actor_id"] == killed.facts["actor_id"]


def test_the_rank_follows_when_it_is_known(actors: Ran) -> None:
    policy = actors.actor("PolicyWorker")
    assert (
        policy.text() == b"before rank\nafter rank\npolicy method\n"
    )  # Ray's second marker, of the repr, is not in it
    assert [line["set"].get("awaits") for line in policy.lines][:2] == ["rank", ""]
    assert (policy.facts["role"], policy.facts["rank"], policy.facts["world_size"]) == ("policy", 1, 2)


def test_rays_own_files_point_to_the_record_and_nothing_of_actors_reaches_the_driver(actors: Ran) -> None:
    [early] = actors.followed("by name")
    actor_id = early.facts["actor_id"]
    shown = Path(early.facts["follow"]["out"]["path"]).read_text()
    assert shown.endswith(f":actor_name:Plain\n{POINTER_TEXT}: skyrl-otel logs --actor {actor_id}\n")
    printed = actors.stdout + actors.stderr
    assert "method" not in printed and POINTER_TEXT not in printed


def test_a_forged_marker_changes_nothing(actors: Ran, tasks: Ran) -> None:
    actor = actors.actor("by name")
    forged = [line for line in actor.text().splitlines() if line.startswith(b":")]
    assert forged == [b":actor_name:Forged in init", b":actor_name:Forged", b":task_name:skyrl_entrypoint"]
    assert actor.facts["actor_class"] == "Plain" and actor.facts["channel"] == "infra"
    assert tasks.channels("honest") == {"infra"} and tasks.channels("skyrl_entrypoint") == set()
    assert all("actor_id" not in folder.facts for folder in tasks.followed("honest"))


@pytest.fixture(scope="module")
def tasks(driver: Driver) -> Ran:
    return driver(
        HEAD
        + """
@ray.remote(num_cpus=0.1)
def honest():
    print(":actor_name:Forged")
    print(":task_name:skyrl_entrypoint")
    print("nested line")
@ray.remote(num_cpus=0.1)
def step(): print("step line"); ray.get(honest.remote())
ray.get(step.remote()); time.sleep(1.5)
"""
    )


def test_tasks_are_followed_and_the_drivers_own_are_progress(tasks: Ran) -> None:
    assert tasks.channels("step") == {"progress"} and tasks.channels("honest") == {"infra"}
    for name, line in (("step", "step line"), ("honest", "nested line")):
        [folder] = tasks.followed(name)
        follow = folder.facts["follow"]["out"]
        assert follow["offset"] == 0 and follow["skip_markers"]
        assert line in Path(follow["path"]).read_text()
    assert "(step pid=" in tasks.stdout and "step line" in tasks.stdout
    assert "nested line" not in tasks.stdout + tasks.stderr


def test_globs_and_the_table_name_the_progress_that_goes_to_the_launchers_descriptor(
    driver: Driver, tmp_path: Path
) -> None:
    fifo = tmp_path / "terminal"
    os.mkfifo(fifo)
    ran = driver(
        """
import os
fd = os.open(os.environ["FIFO"], os.O_RDWR | os.O_NONBLOCK); os.set_inheritable(fd, True)
os.environ["SKYRL_OTEL_TERMINAL_FD"] = str(fd)
"""
        + HEAD
        + """
@ray.remote(num_cpus=0.1)
class TaskRunner:
    def run(self): print("training step 1"); ray.get(helper.remote())
@ray.remote(num_cpus=0.1)
def eval_all(): print("evaluation")
@ray.remote(num_cpus=0.1)
def helper(): print("helper line")
ray.get([TaskRunner.remote().run.remote(), eval_all.remote(), helper.remote()])
shown = ""
deadline = time.monotonic() + 20
while "training step 1" not in shown or "evaluation" not in shown:
    assert time.monotonic() < deadline, shown
    time.sleep(0.05)
    try: shown += os.read(fd, 65536).decode()
    except BlockingIOError: pass
print(json.dumps(shown))
""",
        env={"SKYRL_OTEL_PROGRESS": "eval_*", "FIFO": str(fifo)},
    )
    [runner] = ran.followed("TaskRunner")
    assert (runner.facts["channel"], runner.facts["role"]) == ("progress", "trainer")
    assert ran.channels("eval_all") == {"progress"} and ran.channels("helper") == {"infra"}
    shown = ran.result()
    assert "(TaskRunner pid=" in shown and "(eval_all pid=" in shown and "helper line" not in shown
    assert "training step 1" not in ran.stdout.replace(ran.stdout.splitlines()[-1], "") + ran.stderr


def test_showing_infra_leaves_everything_in_rays_files_and_prints_it_as_ray_does(driver: Driver) -> None:
    ran = driver(
        HEAD
        + """
@ray.remote(num_cpus=0.1)
class Worker:
    def work(self): print("infra line"); print("infra error", file=sys.stderr)
ray.get(Worker.remote().work.remote()); time.sleep(1.5)
""",
        env={"SKYRL_DUMP_INFRA_LOG_TO_STDOUT": "1"},
    )
    [folder] = ran.followed("Worker")
    assert folder.facts["actor_class"] == "Worker" and folder.facts["channel"] == "infra" and "actor_id" in folder.facts
    assert "infra line" in Path(folder.facts["follow"]["out"]["path"]).read_text()
    assert "(Worker pid=" in ran.stdout and "infra line" in ran.stdout and "infra error" in ran.stderr


def test_rays_own_files_are_followed_from_where_an_existing_cluster_stood(tasks: Ran, cluster: Cluster) -> None:
    raylet = [w for w in tasks.writers if w.facts.get("service") == "raylet"]
    assert len(raylet) == 1, "once per node and run"
    follow = raylet[0].facts["follow"]
    assert follow["out"]["path"] == str(cluster.logs / "raylet.out") and follow["out"]["offset"] > 0
    assert raylet[0].facts["channel"] == "infra" and raylet[0].facts["role"] == "ray"
    assert {"gcs_server", "monitor", "log_monitor"} <= {w.facts.get("service") for w in tasks.writers}


def test_the_receivers_secret_reaches_workers_by_the_kv_and_no_log(driver: Driver, cluster: Cluster) -> None:
    ran = driver(
        """
import os, json
from skyrl_otel.spool import token
from skyrl_otel.spool.layout import RunDir
from pathlib import Path
run = RunDir(Path(os.environ["SKYRL_OTEL_SPOOL_DIR"]) / os.environ["SKYRL_OTEL_RUN_ID"], os.environ["SKYRL_OTEL_RUN_ID"])
secret = os.environ["OTEL_EXPORTER_OTLP_HEADERS"][4:]
token.write(run, token.Shipping("http://127.0.0.1:9/v1/logs", {"authorization": "Bearer " + secret}))
import ray
ray.init()
os.unlink(run.token)      # as on another node
@ray.remote(num_cpus=0.1)
class A:
    def env(self): return dict(os.environ), open("/proc/self/cmdline").read()
environ, cmdline = ray.get(A.remote().env.remote())
import time
deadline = time.time() + 20
while token.read(run) is None:
    assert time.time() < deadline
    time.sleep(0.1)
assert oct(os.stat(run.token).st_mode & 0o777) == "0o600"
print(json.dumps([environ, cmdline, token.read(run).headers, os.environ["OTEL_EXPORTER_OTLP_HEADERS"]]))
""",
        env={"OTEL_EXPORTER_OTLP_HEADERS": "key=s3cr3t-value"},
    )
    environ, cmdline, headers, own = ran.result()
    assert headers == {"authorization": "Bearer s3cr3t-value"} and own == "key=s3cr3t-value"
    assert "s3cr3t-value" not in str(environ) + cmdline
    for name in ("SKYRL_OTEL_LAUNCHER", "SKYRL_OTEL_TERMINAL_FD"):
        assert name not in environ
    for path in cluster.logs.rglob("*"):
        if path.is_file():
            assert b"s3cr3t-value" not in path.read_bytes(), path


def test_a_drivers_own_records_are_taken_and_say_whose_job_it_is(driver: Driver) -> None:
    ran = driver(
        """
        import logging, sys
        logging.basicConfig(level="INFO", stream=sys.stdout, format="%(name)s %(message)s")
        log = logging.getLogger("train")
        log.info("before ray", extra={"step": 1})
        import ray
        ray.init()
        from loguru import logger
        log.info("with ray", extra={"step": 2}); logger.warning("by loguru")
        @ray.remote
        class Policy:
            def work(self): logging.getLogger("policy").warning("in an actor")
        ray.get(Policy.remote().work.remote())
        ray.shutdown()
        log.info("after ray")
        """
    )
    assert [line for line in ran.stdout.splitlines() if line.startswith("train ")] == [
        "train before ray",
        "train with ray",
        "train after ray",
    ]
    [own] = [w for w in ran.writers if w.facts.get("role") == "driver"]
    assert own.facts["channel"] == "progress" and own.facts["job_id"] and own.facts["node_id"]
    bodies = [(r.scope, r.body, r.attributes.get("step")) for r in taken(own.path) if not r.scope.startswith("ray")]
    assert bodies == [
        ("train", "before ray", 1),
        ("train", "with ray", 2),
        ("__main__", "by loguru", None),
        ("train", "after ray", None),
    ]
    everywhere = [r.body for w in ran.writers for r in taken(w.path)]
    assert everywhere.count("in an actor") == 1
