"""No record is missed and none is said twice, whatever a program does to `logging` and loguru."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from skyrl_otel.spool import frames
from tests.capture.conftest import Host, Written, written
from tests.capture.frames import Taken, taken

INFRA = "import skyrl_otel; skyrl_otel.attach(role='policy', rank=3, channel='infra')\n"


def records(spool: Path) -> list[Taken]:
    return [record for folder in written(spool) for record in taken(folder.path)]


def text(spool: Path) -> bytes:
    return b"".join(folder.text(name) for folder in written(spool) for name in ("out", "err"))


def test_a_record_has_all_it_knows(host: Host, spool: Path) -> None:
    host(
        INFRA
        + """
import logging
log = logging.getLogger("vllm.engine")
try:
    {}["key"]
except KeyError:
    log.exception("failed %s", "here", extra={"step": 7, "nested": {"a": [1, 2.5, None, True, b"x"]}})
"""
    )
    [record] = records(spool)
    assert (record.scope, record.body, record.severity, record.level) == ("vllm.engine", "failed here", 17, "ERROR")
    attributes = record.attributes
    assert attributes["step"] == 7 and attributes["nested"] == {"a": [1, 2.5, None, True, b"x"]}
    assert attributes["exception.type"] == "KeyError" and attributes["exception.message"] == "'key'"
    assert attributes["exception.stacktrace"].startswith("Traceback") and attributes["thread.name"] == "MainThread"
    assert attributes["code.function.name"] == "<module>" and attributes["code.line.number"] > 0


def test_invariant_9_the_users_logging_calls_do_not_cut_us_off(host: Host, spool: Path) -> None:
    host(
        INFRA
        + """
import logging, logging.config, sys
lone = logging.getLogger("lone"); lone.propagate = False; lone.setLevel("INFO")
log = logging.getLogger("app"); log.setLevel("INFO")
for round in range(50):
    logging.basicConfig(force=True, level="INFO", stream=sys.stderr)
    log.info("after basicConfig %d", round)
log.debug("below its logger's level")
logging.root.handlers = []
log.warning("no handlers"); lone.info("does not propagate")
logging.config.dictConfig({"version": 1, "disable_existing_loggers": False, "root": {"level": "INFO"}})
log.info("after dictConfig")
log.addFilter(lambda record: "secret" not in record.msg)
log.info("secret, filtered"); log.info("passes its filter")
class Own(logging.Logger): pass
logging.setLoggerClass(Own)
made = logging.getLogger("made.later"); made.warning("of another class")
print("done"); log.info("done")
"""
    )
    bodies = [record.body for record in records(spool)]
    assert bodies == [
        *(f"after basicConfig {n}" for n in range(50)),
        "no handlers",
        "does not propagate",
        "after dictConfig",
        "passes its filter",
        "of another class",
        "done",
    ]
    assert text(spool) == b"done\n", "the echo is not recorded a second time, and a print is never one"


def test_loguru_cannot_be_cut_off_either(host: Host, spool: Path) -> None:
    host(
        INFRA
        + """
import copy, sys
from loguru import logger
logger.info("first {}", 1)
logger.remove()
logger.info("no sinks")
logger.trace("below the level it had")
logger.add(sys.stderr, enqueue=True, colorize=True, level="WARNING", format="<red>{message}</red>")
logger.info("below the only sink"); logger.warning("above")
alone = copy.deepcopy(logger.opt()) if False else None
from loguru._logger import Core, Logger
isolated = Logger(core=Core(), exception=None, depth=0, record=False, lazy=False, colors=False, raw=False,
                  capture=True, patchers=[], extra={})
isolated.bind(step=3, stdlib_logger="vllm.worker").error("isolated")
with logger.contextualize(task="t1"):
    try:
        1 / 0
    except ZeroDivisionError:
        logger.opt(exception=True).error("raised")
logger.complete()
try:
    logger.remove(77)
except ValueError:
    logger.error("as ever")
assert logger._core.handlers.copy().keys() == {1}
"""
    )
    found = {record.body: record for record in records(spool)}
    assert list(found) == ["first 1", "no sinks", "above", "isolated", "raised", "as ever"]
    assert found["isolated"].scope == "vllm.worker" and found["isolated"].attributes["step"] == 3
    assert found["raised"].attributes["task"] == "t1"
    assert found["raised"].attributes["exception.type"] == "ZeroDivisionError"
    assert found["above"].severity == 13 and found["above"].scope == "__main__"
    assert text(spool) == b""


INTERCEPT = """
import inspect, logging, sys
from loguru import logger
class ByDepth(logging.Handler):
    def emit(self, record):
        logger.opt(depth=6, exception=record.exc_info).log(record.levelname, record.getMessage())
class ByWalking(logging.Handler):
    def emit(self, record):
        frame, depth = inspect.currentframe(), 0
        while frame and (depth == 0 or frame.f_code.co_filename == logging.__file__):
            frame, depth = frame.f_back, depth + 1
        logger.opt(depth=depth, exception=record.exc_info).log(record.levelname, record.getMessage())
class Naive(logging.Handler):
    def emit(self, record):
        logger.log(record.levelname, record.getMessage())
class Tells(logging.Handler):
    def emit(self, record):
        logger.error("could not forward")
"""


@pytest.mark.parametrize("kind", ["ByDepth", "ByWalking", "Naive"])
def test_a_record_passed_on_to_loguru_is_one_record(host: Host, spool: Path, kind: str, tmp_path: Path) -> None:
    sink = tmp_path / "sink"
    host(
        INFRA
        + INTERCEPT
        + f"""
logger.remove()
logger.add({str(sink)!r}, format="{{function}}:{{line}} {{message}}")
logging.basicConfig(handlers=[{kind}()], level=0, force=True)
def place():
    logging.getLogger("vllm.core").info("one")
place()
logging.getLogger("other").addHandler(Tells())
logging.getLogger("other").warning("two")
logger.info("three")
"""
    )
    assert [(record.scope, record.body) for record in records(spool)] == [
        ("vllm.core", "one"),
        ("other", "two"),
        ("__main__", "could not forward"),
        ("__main__", "three"),
    ]
    lines = sink.read_text().splitlines()
    if kind != "Naive":
        # What the user's own format prints of a caller is what it printed without us.
        assert lines[0].startswith("place:") and lines[0].endswith(" one")


def test_a_loguru_record_passed_on_to_logging_is_one_record(host: Host, spool: Path) -> None:
    host(
        INFRA
        + """
import logging
from loguru import logger
class Propagate(logging.Handler):
    def emit(self, record):
        logging.getLogger(record.name).handle(record)
logger.remove()
logger.add(Propagate(), format="{message}")
logger.add(logging.StreamHandler())
logging.basicConfig(level=0)
logger.info("one")
"""
    )
    assert [record.body for record in records(spool)] == ["one"]
    assert text(spool) == b""


def test_console_handlers_of_infra_are_not_called_and_prints_stay(host: Host, spool: Path) -> None:
    host(
        INFRA
        + """
import logging, sys
from rich.logging import RichHandler
from rich.console import Console
logging.basicConfig(level="INFO", handlers=[
    logging.StreamHandler(sys.stdout), RichHandler(), RichHandler(console=Console(stderr=True))], force=True)
logging.info("once")
print("printed")
Console().print("by rich's console")
logging.root.handlers = []
logging.warning("by the last resort")
"""
    )
    assert [record.body for record in records(spool)] == ["once", "by the last resort"]
    assert text(spool) == b"printed\nby rich's console\n"


def test_a_file_handler_of_dev_stderr_is_a_console_and_one_of_another_file_is_not(
    host: Host, spool: Path, tmp_path: Path
) -> None:
    """As in containers, where all that is to be seen goes to /dev/stdout or /dev/stderr by name."""
    host(
        f"import logging; early = logging.FileHandler({str(tmp_path / 'early')!r})\n"
        + INFRA
        + f"""
import logging, sys
log = logging.getLogger("app"); log.setLevel(20)
own = logging.FileHandler({str(tmp_path / "own")!r})
for handler in (early, own, logging.FileHandler("/dev/stderr"), logging.FileHandler("/dev/stdout")):
    log.addHandler(handler)
for number in range(3):
    log.info("logged %d", number)
    print("printed", number)
"""
    )
    assert [record.body for record in records(spool)] == [f"logged {number}" for number in range(3)]
    assert text(spool) == b"".join(b"printed %d\n" % number for number in range(3))
    for name in ("early", "own"):
        assert (tmp_path / name).read_text().splitlines() == [f"logged {number}" for number in range(3)]


def test_levels_leave_records_out_before_they_are_encoded(host: Host, spool: Path) -> None:
    host(
        INFRA
        + """
import logging
from loguru import logger
logging.basicConfig(level="DEBUG")
for name in ("vllm", "vllm.engine", "vllmx", "ray.data", "other"):
    for level in (10, 20, 30):
        logging.getLogger(name).log(level, f"{name} {level}")
logger.bind(stdlib_logger="ray").info("loguru low"); logger.bind(stdlib_logger="ray").warning("loguru high")
""",
        env={"SKYRL_OTEL_LEVELS": "vllm=INFO,ray=WARNING"},
    )
    assert [record.body for record in records(spool)] == [
        "vllm 20",
        "vllm 30",
        "vllm.engine 20",
        "vllm.engine 30",
        "vllmx 10",
        "vllmx 20",
        "vllmx 30",
        "ray.data 30",
        "other 10",
        "other 20",
        "other 30",
        "loguru high",
    ]


def test_a_forked_child_has_a_folder_of_its_own_that_names_its_parent(host: Host, spool: Path) -> None:
    host(
        INFRA
        + """
import logging, os
logging.basicConfig(level=0)
logging.info("parent")
pid = os.fork()
if pid == 0:
    logging.info("child")
    inner = os.fork()
    if inner == 0:
        logging.info("grandchild")
        os._exit(0)
    os.waitpid(inner, 0)
    os._exit(0)
os.waitpid(pid, 0)
if os.fork() == 0:
    os._exit(0)  # says nothing: has no folder
os.wait()
logging.info("parent again")
"""
    )
    by_body = {record.body: folder for folder in written(spool) for record in taken(folder.path)}
    parent, child, grandchild = by_body["parent"], by_body["child"], by_body["grandchild"]
    assert by_body["parent again"] is parent and len(written(spool)) == 3
    assert f"w-{child.facts['parent']}" == parent.path.name and child.facts["silent_end"]
    assert f"w-{grandchild.facts['parent']}" == child.path.name
    assert child.facts["role"] == "policy" and child.facts["pid"] != parent.facts["pid"]


def test_all_threads_of_a_forked_child_are_heard_from_their_first_record_on(host: Host, spool: Path) -> None:
    host(
        INFRA
        + """
import logging, os, threading
logging.basicConfig(level=0)
for child in range(20):
    pid = os.fork()
    if pid == 0:
        together = threading.Barrier(8)
        def work(number):
            together.wait()
            for count in range(20):
                logging.info("%d %d %d", child, number, count)
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        [thread.start() for thread in threads]; [thread.join() for thread in threads]
        os._exit(0)
    os.waitpid(pid, 0)
"""
    )
    children = [folder for folder in written(spool) if "parent" in folder.facts]
    assert len(children) == 20 and not any("lost" in folder.facts for folder in children)
    for folder in children:
        bodies = [tuple(map(int, record.body.split())) for record in taken(folder.path)]
        assert len({child for child, _, _ in bodies}) == 1 and len(bodies) == 160
        for number in range(8):
            assert [count for _, thread, count in bodies if thread == number] == list(range(20))
        assert not (folder.path / "records.1").exists(), "one place is made, not one for each thread"


def test_a_record_within_the_making_of_a_childs_place_is_not_lost(host: Host, spool: Path) -> None:
    host(
        INFRA
        + """
import logging, os, signal
logging.basicConfig(level=0)
hits = 0
def on_alarm(*_):
    global hits
    hits += 1
    logging.info("alarm %d", hits)
signal.signal(signal.SIGALRM, on_alarm)
for child in range(40):
    pid = os.fork()
    if pid == 0:
        signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0002)
        logging.info("first")
        signal.setitimer(signal.ITIMER_REAL, 0)
        logging.info("hits %d", hits)
        os._exit(0)
    os.waitpid(pid, 0)
"""
    )
    total = 0
    for folder in written(spool):
        bodies = [record.body for record in taken(folder.path)]
        if bodies:
            hits = int(bodies[-1].removeprefix("hits "))
            assert sorted(bodies) == sorted(["first", f"hits {hits}", *(f"alarm {n + 1}" for n in range(hits))])
            total += hits
    assert total > 10, "some came while the place was made"


def test_a_forked_child_tells_its_own_losses(host: Host, spool: Path) -> None:
    host(
        """
import resource, signal
import skyrl_otel; skyrl_otel.attach(role='policy', channel='infra')
import logging, os, shutil, sys
from skyrl_otel.capture import runtime
log = logging.getLogger("x"); log.setLevel(20)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
def child(work):
    pid = os.fork()
    if pid == 0:
        work()
    assert os.waitpid(pid, 0)[1] == 0
def recovers():
    log.info("recovers")
    limit(0)
    for number in range(30): log.info("lost")
    limit(resource.RLIM_INFINITY)
    log.info("taken again")
    os._exit(0)
def finds_its_folder_gone():
    log.info("lost with its folder")
    shutil.rmtree(runtime._runtime.recording.records.folder.path)
    for number in range(5): log.info("lost with its folder")
    sys.exit()
child(recovers); child(finds_its_folder_gone)
assert not runtime.current().recording.records.lost
""",
        env={"SKYRL_OTEL_RAISE": ""},
    )
    told = [
        (folder.facts["lost"]["records"], folder.facts["lost"]["why"])
        for folder in written(spool)
        if "lost" in folder.facts
    ]
    assert sorted(told) == [(6, "the spool was removed"), (30, "File too large")]
    bodies = sorted(record.body for record in records(spool))
    assert bodies == ["recovers", "taken again"]


def test_strange_values_threads_and_signals_never_raise(host: Host, spool: Path) -> None:
    done = host(
        INFRA
        + """
import logging, signal, threading
logging.basicConfig(level=0); logging.raiseExceptions = False
log = logging.getLogger("strange")
class Logs:
    def __str__(self): log.info("inside"); return "me"
    def __repr__(self): log.info("inside", extra={"again": self}); return "me"
class Bad:
    def __str__(self): raise RuntimeError("no")
    __repr__ = __str__
cyclic = []; cyclic.append(cyclic)
log.info("logs %s", Logs(), extra={"it": Logs()})
log.info(Bad()); log.info("bad %s", Bad()); log.info("few %s %s", 1)
log.info("extras", extra={"bad": Bad(), "cyclic": cyclic, "set": {1}, "big": 10**30, "surrogate": "\\udc80", "é": 1})
log.info("lone \\ud800 surrogate"); log.info({"a": "mapping"})
hits = 0
def on_alarm(*_):
    global hits
    hits += 1
    log.info("in a signal handler %d", hits)
signal.signal(signal.SIGALRM, on_alarm); signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
for number in range(20000):
    log.info("busy %d", number)
signal.setitimer(signal.ITIMER_REAL, 0)
log.info("hits %d", hits)
"""
    )
    found = records(spool)
    bodies = [record.body for record in found]
    assert "logs me" in bodies and "lone ? surrogate" in bodies and "{'a': 'mapping'}" in bodies
    assert any("RuntimeError when shown" in body for body in bodies)
    extras = next(record for record in found if record.body == "extras").attributes
    assert extras["cyclic"] == ["<list>"] and extras["set"] == [1] and extras["big"] == str(10**30)
    assert extras["surrogate"] == "?" and extras["é"] == 1 and "RuntimeError" in extras["bad"]
    assert [body for body in bodies if body.startswith("busy")] == [f"busy {n}" for n in range(20000)]
    hits = int(bodies[-1].split()[1])
    assert hits > 0 and sum(body.startswith("in a signal") for body in bodies) == hits
    assert done.stderr == b""


def test_an_active_span_is_named(host: Host, spool: Path) -> None:
    host(
        INFRA
        + """
import logging
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
logging.basicConfig(level=20)
with TracerProvider().get_tracer("t").start_as_current_span("s") as span:
    logging.info("%032x", span.get_span_context().trace_id)
logging.info("outside")
"""
    )
    inside, outside = records(spool)
    assert inside.raw.trace_id.hex() == inside.body and len(inside.raw.span_id) == 8
    assert not outside.raw.trace_id


def test_detach_gives_logging_back(host: Host, spool: Path) -> None:
    host(
        """
import logging
from loguru import logger
from loguru._logger import Core
before = (logging.Logger.filter, logging.Handler.filter, "handlers" in vars(Core))
import skyrl_otel; skyrl_otel.attach(channel="infra")
logging.warning("one"); logger.info("uno")
skyrl_otel.detach()
assert (logging.Logger.filter, logging.Handler.filter, "handlers" in vars(Core)) == before
logging.warning("two"); logger.info("due")
"""
    )
    assert [record.body for record in records(spool)] == ["one", "uno"]


def test_a_handler_alone_takes_what_it_is_given(host: Host, spool: Path) -> None:
    host(
        """
import logging, skyrl_otel
log = logging.getLogger("chosen"); log.setLevel(20)
log.addHandler(skyrl_otel.OTelLogHandler())
log.info("one"); logging.getLogger("other").warning("not chosen")
skyrl_otel.attach()
log.info("two")
"""
    )
    assert [record.body for record in records(spool)][:2] == ["one", "two"]


AFTER_A_HANDLER = """
import logging, sys, skyrl_otel
log = logging.getLogger("chosen"); log.setLevel(20)
log.addHandler(skyrl_otel.OTelLogHandler())
log.info("chosen, before"); logging.getLogger("other").warning("not chosen, before")
print("printed, before", flush=True)
skyrl_otel.attach(ARGUMENTS)
console = logging.StreamHandler(sys.stderr); logging.getLogger("other").addHandler(console)
log.info("chosen, after"); logging.getLogger("other").warning("other, after")
print("printed, after", flush=True)
from loguru import logger
logger.info("loguru, after")
"""
ONCE = ["chosen, before", "chosen, after", "other, after", "loguru, after"]


def test_attach_after_a_handler_alone_redirects_and_takes_all(host: Host, spool: Path) -> None:
    """The handler stays where it is, and adds nothing from then on."""
    done = host(AFTER_A_HANDLER.replace("ARGUMENTS", "role='policy', rank=3, channel='infra'"))
    assert [record.body for folder in in_order(spool) for record in taken(folder.path)] == ONCE
    assert text(spool) == b"printed, after\n", "all that was printed since, and no echo"
    assert done.stdout == b"printed, before\n"
    early, late = in_order(spool)
    assert (late.facts["role"], late.facts["rank"], late.facts["channel"]) == ("policy", 3, "infra")
    assert early.facts["silent_end"] and not late.facts.get("silent_end"), "one process, one end"
    assert early.facts["pid"] == late.facts["pid"]


def test_attach_after_a_handler_alone_follows_a_file(host: Host, spool: Path, tmp_path: Path) -> None:
    with open(tmp_path / "output", "ab") as output:
        host(AFTER_A_HANDLER.replace("ARGUMENTS", ""), stdout=output, stderr=output)
    early, late = in_order(spool)
    noted = [frame.payload for frame in frames_of(late) if frame.payload[:1] == b"{"]
    assert [record.body for folder in (early, late) for record in taken(folder.path)] == ONCE
    assert len(noted) == 2, "the console's echo of each record but the chosen logger's, which has no console"
    assert early.facts["silent_end"] and not late.facts.get("silent_end")
    assert late.facts["follow"]["out"]["path"] == str(tmp_path / "output")


def test_attach_after_a_handler_alone_under_run(host: Host, spool: Path) -> None:
    """Output stays the launcher's: no second folder, and the one that is says who this is from then on."""
    host(AFTER_A_HANDLER.replace("ARGUMENTS", "role='reward'"), env={"SKYRL_OTEL_LAUNCHER": "1"})
    (folder,) = written(spool)
    assert [record.body for record in taken(folder.path)] == ONCE
    assert folder.facts["role"] == "reward" and folder.facts["silent_end"] is False


def in_order(spool: Path) -> list[Written]:
    """The handler's folder first."""
    return sorted(written(spool), key=lambda folder: taken(folder.path)[0].body != ONCE[0])


def frames_of(folder: Written) -> list[frames.Frame]:
    return [item for item in frames.scan((folder.path / "records.0").read_bytes()) if isinstance(item, frames.Frame)]


def test_a_full_disk_and_a_removed_spool_cost_records_and_nothing_else(host: Host, spool: Path) -> None:
    done = host(
        """
import resource, signal
import skyrl_otel; skyrl_otel.attach(role='policy', channel='infra')
import logging, os, shutil, sys, time
from skyrl_otel.capture import runtime
running = runtime.current()
log = logging.getLogger("x"); log.setLevel(20)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log.info("before")
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
for number in range(100):
    log.info("lost %d", number)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
running.recording.records._not_before = 0
log.info("after")
assert sum(running.recording.records.lost.values()) == 100, running.recording.records.lost
running.recording.tell_losses()
""",
        env={"SKYRL_OTEL_RAISE": ""},
    )
    assert done.stderr == b""
    [folder] = written(spool)
    assert [record.body for record in taken(folder.path)] == ["before", "after"]
    assert folder.facts["lost"]["records"] == 100 and "large" in folder.facts["lost"]["why"]
    assert os.listdir(folder.path)


def test_a_forked_child_that_attaches_begins_anew(host: Host, spool: Path) -> None:
    host(
        """
import logging, os, skyrl_otel
skyrl_otel.attach(channel="infra", role="driver")
logging.warning("of the parent")
pid = os.fork()
if pid == 0:
    skyrl_otel.attach(role="env", rank=3, channel="infra")
    logging.warning("of the child")
    from loguru import logger; logger.warning("by loguru")
    os._exit(0)
os.waitpid(pid, 0)
logging.warning("of the parent again")
"""
    )
    found = {w.facts["role"]: [r.body for r in taken(w.path)] for w in written(spool)}
    assert found == {"driver": ["of the parent", "of the parent again"], "env": ["of the child", "by loguru"]}
    assert text(spool) == b"", "no echo is recorded beside its record"


def test_loguru_without_a_python_caller(host: Host, spool: Path) -> None:
    host(INFRA + "import atexit\nfrom loguru import logger\natexit.register(logger.info, 'bye')")
    assert [record.body for record in records(spool)] == ["bye"]


def test_the_echo_of_a_record_that_could_not_be_taken_stays(host: Host, spool: Path) -> None:
    host(
        INFRA
        + """
import logging
logging.basicConfig(level="INFO", format="%(name)s %(message)s")
log = logging.getLogger("app")
log.info("taken")
broken = logging.makeLogRecord({"msg": "not taken", "levelno": 20, "pathname": []})
log.handle(broken)
log.info("taken too")
""",
        env={"SKYRL_OTEL_RAISE": "0"},
    )
    (writer,) = written(spool)
    assert writer.text("err").splitlines() == [b"None not taken"]
    assert [record.body for record in taken(writer.path)] == ["taken", "taken too"]
