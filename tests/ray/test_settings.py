"""The user's own settings under us: runtime_env, job_config, setup hooks, submitted jobs, and programs that refuse us."""

import json
from pathlib import Path

import pytest

from tests.capture.frames import taken
from tests.ray.conftest import Driver, Ran

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

ACTOR = """
import json, os, ray
@ray.remote(num_cpus=0.1)
class Actor:
    def env(self):
        print("recorded")
        return {key: os.environ.get(key) for key in ("MINE", "FROM_HOOK", "FROM_JOB")}
"""
END = "\nprint(json.dumps(ray.get(Actor.remote().env.remote())))\n"


@pytest.fixture
def hooks(tmp_path: Path) -> Path:
    (tmp_path / "their_hooks.py").write_text(
        "import os\ndef sets(): os.environ['FROM_HOOK'] = 'yes'\ndef fails(): raise ValueError('their own mistake')\n"
    )
    return tmp_path


def recorded(ran: Ran) -> bool:
    return ran.actor("Actor").text() == b"recorded\n"


def test_runtime_env_and_a_setup_hook_by_name_are_kept(driver: Driver, hooks: Path) -> None:
    ran = driver(
        f"""{ACTOR}
mine = {{"env_vars": {{"MINE": "1"}}, "worker_process_setup_hook": "their_hooks.sets",
        "py_modules": ["{hooks}/their_hooks.py"], "excludes": ["capture", "config.py"]}}
ray.init(runtime_env=mine)
assert len(mine) == 4 and len(mine["py_modules"]) == 1{END}"""
    )
    assert ran.result() == {"MINE": "1", "FROM_HOOK": "yes", "FROM_JOB": None}
    assert recorded(ran)
    # Ray says that it uploads their module; of ours it says nothing.
    assert "their_hooks.py" in ran.stderr or "Successfully pushed" in ran.stderr
    assert "skyrl_otel" not in ran.stderr and ran.stderr.count("Successfully pushed") <= 1


def test_a_callable_hook_job_config_and_an_actors_own_variables_are_kept(driver: Driver) -> None:
    ran = driver(
        f"""{ACTOR}
from ray.job_config import JobConfig
def hook():
    import os; os.environ["FROM_HOOK"] = "yes"
ray.init(job_config=JobConfig(metadata={{"a": "b"}}, runtime_env={{
    "env_vars": {{"MINE": "2"}}, "worker_process_setup_hook": hook}}))
actor = Actor.options(runtime_env={{"env_vars": {{"RANK": "3", "WORLD_SIZE": "4"}}}}).remote()
print(json.dumps(ray.get(actor.env.remote())))"""
    )
    assert ran.result() == {"MINE": "2", "FROM_HOOK": "yes", "FROM_JOB": None}
    assert recorded(ran)
    facts = ran.actor("Actor").facts
    assert (facts["rank"], facts["world_size"]) == (3, 4)


def test_the_levels_of_the_job_hold_in_workers_of_a_cluster_that_was_there(driver: Driver) -> None:
    ran = driver(
        """
import logging, ray
ray.init()
@ray.remote(num_cpus=0.1)
class Actor:
    def work(self):
        for name in ("vllm.engine", "mine"):
            for level in (logging.INFO, logging.ERROR):
                logging.getLogger(name).setLevel(logging.DEBUG)
                logging.getLogger(name).log(level, "%s %s", name, level)
ray.get(Actor.remote().work.remote())
""",
        env={"SKYRL_OTEL_LEVELS": "vllm=ERROR"},
    )
    found = [(record.scope, record.severity) for record in taken(ran.actor("Actor").path)]
    assert found == [("vllm.engine", 17), ("mine", 9), ("mine", 17)]


def test_a_setup_hook_that_raises_ends_the_actor_as_without_us(driver: Driver, hooks: Path) -> None:
    script = f"""
import json, ray
ray.init(runtime_env={{"env_vars": {{"PYTHONPATH": "{hooks}"}}, "worker_process_setup_hook": "their_hooks.fails"}})
@ray.remote(num_cpus=0.1)
class Actor:
    def work(self): pass
try:
    ray.get(Actor.remote().work.remote())
except Exception as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""
    ran = driver(script)
    kind, text = ran.result()
    kind_without, text_without = driver(script, env={"OTEL_SDK_DISABLED": "true"}).result()
    assert kind == kind_without == "ActorDiedError"
    assert "their own mistake" in text and "their own mistake" in text_without
    assert "Failed to execute the setup hook method, their_hooks.fails" in text
    assert "skyrl_otel" not in text.split("Failed to execute")[1]
    # What the worker said of it is in a file that is followed, and so recorded.
    places = [place for writer in ran.writers for place in writer.facts.get("follow", {}).values()]
    said = [Path(place["path"]).read_text(errors="replace") for place in places]
    assert any("their own mistake" in text and "Traceback" in text for text in said), said


def test_a_submitted_jobs_environment_is_merged_as_ray_does(driver: Driver) -> None:
    job = json.dumps({"runtime_env": {"env_vars": {"FROM_JOB": "yes"}}, "metadata": {}})
    ran = driver(
        f"{ACTOR}\nray.init(runtime_env={{'env_vars': {{'MINE': '3'}}}}){END}", env={"RAY_JOB_CONFIG_JSON_ENV_VAR": job}
    )
    assert ran.result() == {"MINE": "3", "FROM_HOOK": None, "FROM_JOB": "yes"}
    assert recorded(ran)
    refused = "import ray\nray.init(runtime_env={'env_vars': {'FROM_JOB': 'no'}})"
    with_us = driver(refused, env={"RAY_JOB_CONFIG_JSON_ENV_VAR": job}, check=False)
    without = driver(refused, env={"RAY_JOB_CONFIG_JSON_ENV_VAR": job, "OTEL_SDK_DISABLED": "true"}, check=False)
    assert with_us.returncode == without.returncode == 1
    assert with_us.stderr.splitlines()[-1] == without.stderr.splitlines()[-1]


def test_runtime_env_after_a_handler_alone(driver: Driver) -> None:
    """The process has a runtime by then, for the handler's records; its job's workers are recorded all the same."""
    ran = driver(
        f"""{ACTOR}
import logging, skyrl_otel
log = logging.getLogger("chosen"); log.setLevel(20)
log.addHandler(skyrl_otel.OTelLogHandler())
log.info("before")
ray.init(runtime_env=skyrl_otel.runtime_env({{"env_vars": {{"MINE": "5"}}}}))
log.info("after"){END}""",
        env={"SKYRL_OTEL_LAUNCHER": ""},
    )
    assert ran.result()["MINE"] == "5" and recorded(ran)
    [ours] = [writer for writer in ran.writers if taken(writer.path)]
    assert [record.body for record in taken(ours.path)] == ["before", "after"]
    assert ours.facts["job_id"] == ran.actor("Actor").facts["job_id"]


def test_implicit_init_and_a_second_init(driver: Driver) -> None:
    ran = driver(
        f"""{ACTOR}
actor = Actor.remote()
assert ray.is_initialized()
ray.init(ignore_reinit_error=True)
try:
    ray.init()
except RuntimeError as error:
    assert "twice" in str(error)
print(json.dumps(ray.get(actor.env.remote())))"""
    )
    assert ran.result()["MINE"] is None and recorded(ran)


def test_without_the_launcher_by_one_line(driver: Driver) -> None:
    ran = driver(
        f"""{ACTOR}
import skyrl_otel
env = skyrl_otel.runtime_env({{"env_vars": {{"MINE": "4"}}}})
assert "OTEL_EXPORTER_OTLP_HEADERS" not in json.dumps(env) and "s3cr3t" not in json.dumps(env)
ray.init(runtime_env=env){END}""",
        env={
            "SKYRL_OTEL_LAUNCHER": "",
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
            "OTEL_EXPORTER_OTLP_HEADERS": "authorization=s3cr3t",
        },
    )
    assert ran.result()["MINE"] == "4" and recorded(ran)
    assert json.loads((ran.run / "token").read_text())["headers"] == {"authorization": "s3cr3t"}


KEYS = """
from ray.experimental.internal_kv import internal_kv_get_gcs_client
def keys():
    client = internal_kv_get_gcs_client()
    found = client.internal_kv_keys(b"skyrl-otel/", b"skyrl-otel", 10)
    return {key.decode(): client.internal_kv_get(key, b"skyrl-otel", 10).decode() for key in found}
"""


def test_a_driver_that_ends_takes_its_secret_out_of_the_cluster(driver: Driver) -> None:
    endpoint = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=s3cr3t",
    }
    # Once by ray.shutdown(), once by its end.
    ended = driver(
        f"""{ACTOR}{KEYS}
mine = f"skyrl-otel/{{os.environ['SKYRL_OTEL_RUN_ID']}}/"
for time in range(2):
    ray.init()
    ray.get(Actor.remote().env.remote())
    found = {{key: value for key, value in keys().items() if key.startswith(mine)}}
    assert sum("s3cr3t" in value for value in found.values()) == 1 and len(found) == 2, found
    if not time: ray.shutdown()""",
        env=endpoint,
    )
    assert json.loads((ended.run / "token").read_text())["headers"] == {"authorization": "s3cr3t"}
    assert json.loads((ended.run / "nodes").read_text())
    # An actor that lives on may start again where no token is.
    options = "name='stays', lifetime='detached', namespace='here'"
    stays = driver(f"{ACTOR}\nray.init()\nray.get(Actor.options({options}).remote().env.remote())", env=endpoint)
    look = f"import json, ray\nray.init(namespace='here'){KEYS}\nprint(json.dumps(keys()))\nray.kill(ray.get_actor('stays'))"
    found = driver(look, env={"OTEL_SDK_DISABLED": "true"}).result()
    assert not [key for key in found if ended.run.name in key]
    assert [key.split("/")[1] for key, value in found.items() if "s3cr3t" in value] == [stays.run.name]


def test_another_rays_internals_cost_the_record_not_the_program(driver: Driver) -> None:
    ran = driver(
        f"""{ACTOR}
from skyrl_otel.capture import guard
from skyrl_otel.integrations.ray import packaging, printing
packaging._LOGGERS = (None, 3)
printing._MOST_NAMES = len(printing.submitted) + 2
ray.init()
@ray.remote(num_cpus=0.1)
def task(): return 7
for n in range(5): task.options(name=str(n)).remote()
assert len(printing.submitted) == printing._MOST_NAMES
printing.submitted = ()
assert ray.get(task.remote()) == 7
print(json.dumps(dict(guard.counts)))""",
        env={"SKYRL_OTEL_RAISE": ""},
    )
    assert (ran.result()["ray.upload"], ran.result()["ray.submitted"]) == (1, 1)


def test_the_client_is_refused_in_one_line(driver: Driver) -> None:
    ran = driver(
        """
import ray
ray.client = lambda *arguments, **options: print(arguments, options) or 1 / 0
try:
    ray.init("ray://127.0.0.1:1")
except ZeroDivisionError:
    print("their error")
""",
        env={"RAY_ADDRESS": ""},
    )
    assert ran.stdout == "('ray://127.0.0.1:1',) {'_deprecation_warn_enabled': False}\ntheir error\n"
    assert ran.stderr.count("skyrl-otel: ray:// is Ray Client") == 1


def test_actors_with_py_modules_of_their_own_live_and_are_recorded(driver: Driver, hooks: Path) -> None:
    ran = driver(
        f"""{ACTOR}
@ray.remote(num_cpus=0.1)
class Outer:
    def work(self, modules):
        return ray.get(Actor.options(runtime_env={{"py_modules": modules}}).remote().env.remote())
ray.init(runtime_env={{"py_modules": ["{hooks}/their_hooks.py"]}})
theirs = ray.get_runtime_context().runtime_env["py_modules"][:1]
print(json.dumps([
    ray.get(Actor.options(runtime_env={{"py_modules": theirs, "env_vars": {{"MINE": "5"}}}}).remote().env.remote()),
    ray.get(Outer.remote().work.remote(theirs)),
]))"""
    )
    assert [env["MINE"] for env in ran.result()] == ["5", None]
    assert [w.text() for w in ran.writers if w.facts.get("actor_class") == "Actor" and "follow" not in w.facts] == [
        b"recorded\n",
        b"recorded\n",
    ]


def test_an_init_that_was_taken_before_we_wrapped_it(driver: Driver) -> None:
    ran = driver(
        f"""from ray import init
{ACTOR}
import skyrl_otel, time
init(runtime_env=skyrl_otel.runtime_env())
from skyrl_otel.integrations.ray import driver
deadline = time.monotonic() + 20
while not driver._served:
    assert time.monotonic() < deadline
    time.sleep(0.05){END}""",
        env={"SKYRL_OTEL_LAUNCHER": ""},
    )
    assert recorded(ran)


@pytest.mark.slow
def test_under_rays_rotation_an_actor_loses_nothing_and_tasks_are_found_by_path(driver: Driver) -> None:
    ran = driver(
        """
import json, os, ray
ray.init(num_cpus=2, include_dashboard=False)
@ray.remote(num_cpus=0.1)
class Killed:
    def work(self):
        for i in range(2000): print("line", i)
        os.kill(os.getpid(), 9)
@ray.remote(num_cpus=0.1)
def task(): return os.readlink("/proc/self/fd/1")
try: ray.get(Killed.remote().work.remote())
except ray.exceptions.RayActorError: pass
print(json.dumps(ray.get(task.remote())))
""",
        env={"RAY_ADDRESS": "local", "RAY_ROTATION_MAX_BYTES": "20000", "RAY_ROTATION_BACKUP_COUNT": "3"},
    )
    assert ran.result().startswith("pipe:")
    assert ran.actor("Killed").text().splitlines() == [f"line {i}".encode() for i in range(2000)]
    [folder] = ran.followed("task")
    assert Path(folder.facts["follow"]["out"]["path"]).name.startswith("worker-")
