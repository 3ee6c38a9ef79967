"""Makes the samples: real programs log, and say beside it what they logged.

`python make.py NAME` with NAME's program installed writes `NAME-VERSION.log` and `NAME-VERSION.jsonl`. A line of the
latter is what a program meant by one event: severity, logger, body, when, and as far as the format prints them the place in the
source, the process and the exception.

Where a program logs what we tell it to, that is what was told. Where it logs what it likes, it is its line taken apart by
`split.py`, which knows nothing of our patterns; `python make.py --split FILE.log` writes the .jsonl of such output alone.
"""

from __future__ import annotations

import ast
import contextlib
import faulthandler
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
os.environ["TZ"] = "UTC"
time.tzset()
NUMBERS = {"debug": 5, "info": 9, "success": 10, "warning": 13, "error": 17, "critical": 21}
TEXTS = (
    ("debug", "loading shard 1 of 3"),
    ("info", "init engine took 4.87 s: {'a': 1}"),
    ("info", "Avg prompt throughput: 0.0 tokens/s, Running: 0 reqs - idle | ok"),
    ("warning", "écart de 3 ms [retry]"),
    ("error", "request failed: code=500"),
    ("info", "after the error"),
    ("critical", "no GPU left"),
)
EXPECTED: list[dict[str, Any]] = []


def expect(
    level: str | int, message: str, logger: str = "", *, error: BaseException | None = None, **more: Any
) -> None:
    """Say what is about to be logged, by the line behind the one that says so; `error` if it is logged with it."""
    number = NUMBERS[level] if isinstance(level, str) else level
    caller = sys._getframe(1)
    place = {"file": "make.py", "function": caller.f_code.co_name, "line": caller.f_lineno + 1}
    if error is not None:
        more |= raised(error)
        message += "\n" + more["stack"]
    EXPECTED.append({"severity": number, "logger": logger, "message": message, "time": time.time(), **place, **more})


def raised(error: BaseException) -> dict[str, str]:
    """An exception as it is printed."""
    kind = type(error)
    name = (
        kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"
    )
    stack = "".join(traceback.format_exception(error)).rstrip("\n")
    said = "\n".join((str(error), *getattr(error, "__notes__", ())))
    return {"exception": name, "exception_message": said.rstrip(), "stack": stack}


def say(log: Any, logger: str) -> None:
    """The texts, then an exception with a cause."""
    for level, text in TEXTS:
        expect(level, text, logger)
        getattr(log, level)(text)
    try:
        try:
            {}["missing"]
        except KeyError as error:
            raise RuntimeError("step 7 failed\nsee the second line") from error
    except RuntimeError as error:
        expect("error", "training stopped", logger, error=error)
        log.exception("training stopped")
    expect("info", "last", logger)
    log.info("last")


def stdlib(layout: str | None, handler: logging.Handler | None = None) -> None:
    handler = handler or logging.StreamHandler()
    handler.setFormatter(logging.Formatter(layout or logging.BASIC_FORMAT)) if layout != "" else None
    logging.basicConfig(level=logging.DEBUG, handlers=[handler], force=True)
    say(logging.getLogger("my_app.train"), "my_app.train" if "%(name)" in (layout or "%(name)") else "")


def say_loguru(logger: Any) -> None:
    """loguru draws its own traceback: what it hands to a sink of ours is what it means."""
    drawn: list[str] = []
    logger.add(drawn.append, colorize=False)
    say(logger, "__main__")
    expect("success", "saved", "__main__")
    logger.success("saved")
    for record, text in zip(EXPECTED, drawn, strict=True):
        record["message"] = text.partition(" - ")[2].rstrip("\n")
        if "stack" in record:
            record["stack"] = record["message"].partition("\n")[2].lstrip("\n")


def make_loguru() -> None:
    from loguru import logger

    say_loguru(logger)


def make_colour() -> None:
    """loguru as SkyRL sets it up: colours forced."""
    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, colorize=True)
    say_loguru(logger)


def make_structlog() -> None:
    import structlog

    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S", utc=False),
            structlog.dev.ConsoleRenderer(colors=False, pad_event_to=0),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    for level, text in TEXTS:
        expect(level, text)
        getattr(structlog.get_logger(), level)(text)


def make_structlog_json() -> None:
    import structlog

    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    for level, text in TEXTS:
        expect(level, text)
        getattr(structlog.get_logger(), level)(text, step=7)
    say(structlog.get_logger(), "")
    as_fields()


def as_fields() -> None:
    """In JSON the exception has a field of its own; the body is the message alone."""
    for record in EXPECTED:
        record["message"] = record["message"].partition("\n")[0]


def make_python_json_logger() -> None:
    from pythonjsonlogger.json import JsonFormatter

    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.DEBUG, handlers=[handler], force=True)
    for level, text in TEXTS:
        expect(level, text, "my_app.train")
        getattr(logging.getLogger("my_app.train"), level)(text)
    say(logging.getLogger("my_app.train"), "my_app.train")
    as_fields()


def make_absl() -> None:
    from absl import logging as absl

    absl.use_absl_handler()
    absl.set_verbosity(absl.INFO)
    expect("warning", "Logging before flag parsing goes to stderr.")
    without_place()
    for level, text in TEXTS:
        if level in ("info", "warning", "error"):
            expect(level, text, "glog")
            getattr(absl, level)(text)


def make_uvicorn() -> None:
    from uvicorn.logging import DefaultFormatter

    handler = logging.StreamHandler()
    handler.setFormatter(DefaultFormatter("%(levelprefix)s %(message)s", use_colors=False))
    logging.basicConfig(level=logging.DEBUG, handlers=[handler], force=True)
    say(logging.getLogger("uvicorn.error"), "")


def make_uvicorn_server() -> None:
    """Its own log and its access log."""
    import uvicorn

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 503 if "bad" in scope["path"] else 200, "headers": []})
            await send({"type": "http.response.body", "body": b"x"})

    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", use_colors=False))
    logging.getLogger("uvicorn.access").handlers[0].stream = sys.stderr  # one file is enough
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    for path in ("/", "/bad?x=1"):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
            client.recv(1000)
    server.should_exit = True
    thread.join()


def make_deepspeed() -> None:
    stdlib(DEEPSPEED)
    for record in EXPECTED:
        record["logger"] = "deepspeed"


def make_vllm_old() -> None:
    """The old layout, by vLLM 0.7.3's own logger, formatter and worker prefix out of its wheel; no engine runs.

    `vllm/logger.py`, `vllm/logging_utils/formatter.py`, and `_add_prefix` of `vllm/executor/multiproc_worker_utils.py`.
    """
    folder = Path(tempfile.mkdtemp())
    pip = [
        f"{sys.base_prefix}/bin/python3",
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "vllm==0.7.3",
    ]
    subprocess.run([*pip, "-d", folder, "--platform=manylinux1_x86_64"], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        names = [
            name for name in wheel.namelist() if name.startswith(("vllm/logg", "vllm/envs.py", "vllm/executor/multip"))
        ]
        wheel.extractall(folder, names)
    (folder / "vllm/__init__.py").touch()  # the package's own imports torch
    sys.path.insert(0, str(folder))
    os.environ["VLLM_LOGGING_LEVEL"] = "DEBUG"
    sys.stdout = os.fdopen(2, "w", buffering=1, closefd=False)
    from vllm.logger import init_logger

    logger = init_logger("vllm.engine.llm_engine")
    say(logger, "vllm")
    count = len(EXPECTED)
    source = (folder / "vllm/executor/multiproc_worker_utils.py").read_text()
    tree = ast.parse(source)
    tree.body = [
        part
        for part in tree.body
        if getattr(part, "name", "") == "_add_prefix"
        or ast.unparse(part).startswith(("CYAN =", "RESET =", "from typing"))
    ]
    space: dict[str, Any] = {}
    exec(compile(tree, "multiproc_worker_utils.py", "exec"), space)
    space["_add_prefix"](sys.stdout, "VllmWorkerProcess", os.getpid())
    say(logger, "vllm")
    for record in EXPECTED[count:]:
        record.update(child="VllmWorkerProcess", pid=os.getpid())
    shutil.rmtree(folder)


VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
TINY = {"load-format": "dummy", "max-model-len": "128", "dtype": "float32"}
ENGINE = """
import sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], load_format="dummy", enforce_eager=True, max_model_len=128, dtype="float32",
              tensor_parallel_size=2, distributed_executor_backend="mp")
    print("generated", len(llm.generate(["w1 w2 w3"], SamplingParams(max_tokens=4), use_tqdm=False)))
"""
# The CPU build is named "vllm-cpu", and what `vllm serve` asks for its version is "vllm".
ALIAS = """
import importlib.metadata as metadata
real = metadata.version
metadata.version = lambda name: real("vllm-cpu") + "+cpu" if name == "vllm" else real(name)
"""


@contextlib.contextmanager
def vllm_folder() -> Iterator[Path]:
    """The current folder, with a tiny model in `tiny`, for the environment of `scripts/vllm-env`."""
    sys.path.insert(0, str(HERE.parents[2]))
    from tests.stack.programs.vllm_job import tiny_model

    os.environ.update(VLLM)
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        os.mkdir("tiny")
        tiny_model("tiny")
        yield Path(name)
        os.chdir("/")


def make_vllm_tp2() -> None:
    """An engine and two workers; here it was ended by SIGTERM in its first step, and died with a traceback."""
    with vllm_folder() as folder:
        (folder / "engine.py").write_text(ENGINE)
        stderr_of([sys.executable, "engine.py", "tiny"])


def make_vllm_death() -> None:
    """A model that no attention can divide: worker, engine and the process that asked die one after the other."""
    with vllm_folder():
        stderr_of([sys.executable, str(HERE.parents[1] / "stack/vllm_death.py"), "tiny"])


def make_vllm_serve() -> None:
    """`vllm serve`, asked for a completion and for what is not there."""
    with vllm_folder() as folder:
        (folder / "sitecustomize.py").write_text(ALIAS)
        os.environ["PYTHONPATH"] = str(folder)
        options = [word for key, value in TINY.items() for word in (f"--{key}", value)]
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "tiny", "--enforce-eager", *options]
        server = subprocess.Popen([*command, "--host=127.0.0.1", "--port=18123"], stdout=2)
        while server.poll() is None and not asked("/v1/models"):
            time.sleep(2)
        asked("/v1/completions", b'{"model": "tiny", "prompt": "w1 w2", "max_tokens": 4}')
        asked("/v1/nothing")
        time.sleep(11)  # its statistics come every ten seconds
        server.terminate()
        server.wait()


def asked(path: str, body: bytes | None = None) -> bool:
    """Whether the server answered."""
    request = urllib.request.Request(f"http://127.0.0.1:18123{path}", body, {"content-type": "application/json"})
    try:
        urllib.request.urlopen(request, timeout=60).read()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def make_ray() -> None:
    from ray._private import ray_constants

    stdlib(ray_constants.LOGGER_FORMAT)
    for record in EXPECTED:
        record["logger"] = "ray"


def make_torch() -> None:
    """c10d's C++ log, as a rank prints it."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:29511", rank=0, world_size=1)
    dist.destroy_process_group()


def make_ray_core() -> None:
    """What the GCS prints in its first seconds, with nobody to talk to."""
    stderr_of([ray_binary("gcs/gcs_server"), *GCS], kill=15)


GCS = ("--gcs_server_port=0", "--config_list=e30=", "--session_name=s", "--node_ip_address=127.0.0.1", "--log_dir=")


def ray_binary(name: str) -> str:
    import ray

    return str(Path(ray.__file__).parent / "core/src/ray" / name)


def stderr_of(command: list[str], kill: int = 0) -> str:
    """Run `command`, end it with `kill` after 3 s, pass on what it printed and return it."""
    done = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    if kill:
        time.sleep(3)
        done.send_signal(kill)
    text = done.communicate()[0]
    os.write(2, text)
    return text.decode("utf-8", "replace")


def without_place() -> None:
    """The last event expected does not say where it was logged."""
    for key in FREE:
        EXPECTED[-1].pop(key, None)


def between() -> None:
    """A line that ends what stands open."""
    expect("info", "between", "main")
    without_place()
    os.write(2, b"INFO:main:between\n")


def make_check() -> None:
    """RAY_CHECK in a raylet: twice, for its file and its stderr are one."""
    for half in stderr_of([ray_binary("raylet/raylet")]).rstrip("\n").split("\n\n"):
        expect("critical", half.partition("main.cc:")[2].partition(": ")[2], "raylet", file="main.cc")
        EXPECTED[-1].update(line=int(half.partition("main.cc:")[2].partition(":")[0]), pid=int(half.split()[3]))
    between()


def make_sigsegv() -> None:
    """absl's failure handler, alone and through Ray's log, where each line stands twice."""
    text = stderr_of([ray_binary("gcs/gcs_server"), *GCS], kill=11)
    lines = text[text.index("*** SIGSEGV") :].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("["))
    logged = [line.partition("logging.cc:")[2].partition(": ")[2] for line in lines[first:]]
    keep_from(text.index("*** SIGSEGV"))
    expect("critical", "\n".join(lines[:first]))
    without_place()
    expect("error", "\n".join(logged), "gcs_server", file="logging.cc")
    EXPECTED[-1].update(
        line=int(lines[-1].partition("logging.cc:")[2].partition(":")[0]), pid=int(lines[-1].split()[3])
    )
    between()


def text_so_far() -> str:
    """What the file has."""
    return os.pread(2, 1 << 20, 0).decode()


def keep_from(offset: int) -> None:
    """Forget what the file has before `offset`."""
    data = text_so_far().encode()
    os.ftruncate(2, 0)
    os.lseek(2, 0, 0)
    os.write(2, data[offset:])


TORCH_CHECK = """
import ctypes, pathlib, torch
lib = ctypes.CDLL(str(pathlib.Path(torch.__file__).parent / "lib/libtorch_cpu.so"))
lib.aoti_torch_check(False, b"forward", b"/srv/csrc/kernel.cpp", 88, b"Expected size 4 but got 5\\nsee the second line")
"""


def make_torch_check() -> None:
    """TORCH_CHECK where nobody catches it."""
    expect("critical", stderr_of([sys.executable, "-c", TORCH_CHECK]).rstrip("\n"))
    between()


def make_shell() -> None:
    """What bash and dash say of a child that a signal ended, and glibc of a heap that is broken."""
    dies = "{python} -c 'import os; os.kill(os.getpid(), {number})'; true"
    for number in (11, 6, 7, 9):
        for shell in ("bash", "dash"):
            text = stderr_of([shell, "-c", dies.format(python=sys.executable, number=number)]).rstrip("\n")
            expect("critical", text)
            if shell == "bash":
                EXPECTED[-1]["pid"] = int(re.findall(r"\d+", text)[1])
    code = "import ctypes; libc = ctypes.CDLL(None); libc.malloc.restype = ctypes.c_void_p; p = ctypes.c_void_p(libc.malloc(9999999))"  # noqa: E501
    free = f"{code}; libc.free(ctypes.c_void_p(p.value + 8))"
    expect("critical", stderr_of([sys.executable, "-c", free]).rstrip("\n"))
    between()


CUDA = """CUDA error: device-side assert triggered
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""
"""c10/cuda/CUDAException.cpp and c10/cuda/CUDAMiscFunctions.cpp; no GPU was needed to print it."""

RAISERS = {
    "cuda": f"raise RuntimeError({CUDA!r})",
    "chain": f"try:\n    raise RuntimeError({CUDA!r})\nexcept RuntimeError as error:\n    raise ValueError('step 7\\nof 9') from error",  # noqa: E501
    "pydantic": "import pydantic\nclass M(pydantic.BaseModel):\n    x: int\n    y: list[int]\nM(x='a', y=['b', 2])",
    "empty": "raise RuntimeError('\\n\\n-- Process 0 terminated with the following error:\\nTraceback (most recent call last):\\n  File \"x.py\", line 1\\nKeyError: 1')",  # noqa: E501
    "notes": "error = ValueError('bad')\nerror.add_note('in shard 3\\nof 7')\nraise error",
    "groups": "raise ExceptionGroup('outer', [ExceptionGroup('inner', [KeyError('a'), ValueError('two\\nlines')]), OSError(2, 'b')])",  # noqa: E501
    "ray": "import ray\ncause = ValueError('bad\\nshape')\n"
    "raise ray.exceptions.RayTaskError('f', 'ray::f() (pid=7, ip=10.0.0.1)\\n  File \"x.py\", line 1, in f\\nValueError: bad\\nshape', cause)"  # noqa: E501
    ".as_instanceof_cause()",
    "spawn": "import torch.multiprocessing as mp\nif __name__ == '__main__':\n    mp.spawn(divmod, args=(0,))",
}
HOOK = """
import json, os, sys
sys.path.insert(0, {here!r})
import make
def hook(kind, error, trace):
    os.write(int(os.environ["SAID"]), json.dumps(make.raised(error)).encode())
sys.excepthook = hook
"""


def make_raised() -> None:
    """Exceptions whose message has several lines, as the interpreter prints them."""
    for program in RAISERS.values():
        text, said = printed_and_said(program)
        expect("error", text.rstrip("\n"), **said)
        os.write(2, text.encode())
        between()


def printed_and_said(program: str) -> tuple[str, dict[str, str]]:
    """What the interpreter prints of an uncaught exception, and what the exception itself says, of a second run."""
    path = HERE / "raises.py"
    try:
        path.write_text(program + "\n")
        done = subprocess.run([sys.executable, path], stderr=subprocess.PIPE, text=True, check=False)
        reader, writer = os.pipe()
        path.write_text(HOOK.format(here=str(HERE)) + program + "\n")
        environment = {**os.environ, "SAID": str(writer)}
        subprocess.run(
            [sys.executable, path], pass_fds=[writer], env=environment, stderr=subprocess.DEVNULL, check=False
        )
        os.close(writer)
        with os.fdopen(reader) as file:
            said = json.loads(file.read())
    finally:
        path.unlink()
    return done.stderr, {**said, "stack": done.stderr.rstrip("\n")}


def make_bars() -> None:
    """A bar over a loop of 30, one whose last state is wiped, and a line after them."""
    from tqdm import tqdm

    for leave in (True, False):
        with tqdm(range(30), desc="train", mininterval=0.02, leave=leave, ncols=60, file=sys.stderr) as bar:
            for _ in bar:
                time.sleep(0.01)
    first, second = ([state for state in line.split("\r") if state.strip()] for line in text_so_far().split("\n"))
    expect(0, first[-1], states=len(first) - 1)
    between()
    EXPECTED[-1]["states"] = len(second)


def make_warnings() -> None:
    for text in ("first", "second: with colon"):
        expect("warning", f"FutureWarning: {text}\n  warnings.warn(text, FutureWarning, stacklevel=1)", "py.warnings")
        warnings.warn(text, FutureWarning, stacklevel=1)


def make_traceback() -> None:
    """What the interpreter prints of an exception that nobody caught: chained, and a group."""
    programs = {
        "ValueError": "try:\n    {}['x']\nexcept KeyError:\n    raise ValueError('second')",
        "ExceptionGroup": "raise ExceptionGroup('both', [KeyError('a'), OSError(2, 'b')])",
        "AssertionError": "def f(n):\n    assert n\n    f(n - 1)\nf(40)",
        "SyntaxError": "exec('a b')",
    }
    for kind, program in programs.items():
        done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, check=False)
        stack = done.stderr.rstrip("\n")
        said = (
            stack.rpartition(f"{kind}: ")[2]
            if kind in stack.splitlines()[-1] and ": " in stack.splitlines()[-1]
            else ""
        )
        said = "both (2 sub-exceptions)" if kind == "ExceptionGroup" else said
        expect("error", stack, exception=kind, exception_message=said, stack=stack)
        os.write(2, done.stderr.encode())
        between()


def make_faulthandler() -> None:
    for program in ("ctypes.string_at(0)", "os.abort()"):
        code = f"import ctypes, faulthandler, os; faulthandler.enable(); {program}"
        done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=False)
        expect("critical", done.stderr.rstrip("\n"))
        os.write(2, done.stderr.encode())
        print("between", file=sys.stderr, flush=True)
        expect(0, "between")


def make_pretty() -> None:
    """A printed configuration."""
    text = json.dumps({"model": {"layers": [1, 2]}, "lr": 0.1}, indent=2)
    print(text, file=sys.stderr)
    expect(0, text)
    print("trainer:", file=sys.stderr)
    print("  gpus: 8\n  nodes:\n    - a\ndone", file=sys.stderr)
    expect(0, "trainer:\n  gpus: 8\n  nodes:\n    - a")
    expect(0, "done")


def python_version() -> str:
    return platform.python_version()


HYDRA = "[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"
DEEPSPEED = "[%(asctime)s] [%(levelname)s] [%(filename)s:%(lineno)d:%(funcName)s] %(message)s"
PLACE, FUNCTION = ("file", "line"), ("function", "line")
NAMES: dict[str, tuple[Callable[[], None], str, tuple[str, ...]]] = {
    "loguru": (make_loguru, "loguru", FUNCTION),
    "loguru-colour": (make_colour, "loguru", FUNCTION),
    "structlog": (make_structlog, "structlog", ()),
    "structlog-json": (make_structlog_json, "structlog", ()),
    "python-json-logger": (make_python_json_logger, "python-json-logger", ()),
    "absl": (make_absl, "absl-py", PLACE),
    "uvicorn": (make_uvicorn, "uvicorn", ()),
    "uvicorn-server": (make_uvicorn_server, "uvicorn", ()),
    "vllm-tp2": (make_vllm_tp2, "vllm-cpu", ()),
    "vllm-death": (make_vllm_death, "vllm-cpu", ()),
    "vllm-serve": (make_vllm_serve, "vllm-cpu", ()),
    "vllm-own-logger-alone": (make_vllm_old, "vllm==0.7.3", (*PLACE, "pid")),
    "ray": (make_ray, "ray", PLACE),
    "ray-core": (make_ray_core, "ray", PLACE),
    "ray-check": (make_check, "ray", (*PLACE, "pid")),
    "ray-sigsegv": (make_sigsegv, "ray", (*PLACE, "pid")),
    "torch": (make_torch, "torch", PLACE),
    "torch-check": (make_torch_check, "torch", ()),
    "tqdm": (make_bars, "tqdm", ("states",)),
    "basic": (lambda: stdlib(None), "", ()),
    "asctime": (lambda: stdlib("%(asctime)s - %(name)s - %(levelname)s - %(message)s"), "", ()),
    "asctime-level": (lambda: stdlib("%(asctime)s %(levelname)s %(name)s: %(message)s"), "", ()),
    "asctime-bracket": (lambda: stdlib("%(asctime)s [%(levelname)s] %(message)s"), "", ()),
    "brackets": (lambda: stdlib("[%(asctime)s] %(levelname)s %(message)s"), "", ()),
    "hydra": (lambda: stdlib(HYDRA), "", ()),
    "deepspeed-from-source": (make_deepspeed, "", (*FUNCTION, "file")),
    "warnings": (make_warnings, "", ()),
    "traceback": (make_traceback, "", ()),
    "raised": (make_raised, "", ()),
    "faulthandler": (make_faulthandler, "", ()),
    "shell": (make_shell, "", ("pid",)),
    "pretty": (make_pretty, "", ()),
}
"""By name: what makes it, whose version it bears, and what of `expect` such a line says."""
FREE = ("file", "line", "function", "pid", "states")


@contextlib.contextmanager
def stderr_in(path: Path) -> Iterator[None]:
    with path.open("w+b") as file:
        keep = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(keep, 2)


def main(name: str) -> None:
    make, package, prints = NAMES[name]
    _, pinned, version = package.partition("==")
    if not pinned:
        version = importlib.metadata.version(package) if package else f"python-{python_version()}"
    faulthandler.disable()
    path = HERE / f"{name}-{version}.log"
    with stderr_in(path):
        make()
    text = path.read_bytes().decode("utf-8", "replace")
    for place, instead in ((str(HERE), "/srv/job"), (sys.base_prefix, "/opt/python"), (sys.prefix, "/opt/venv")):
        text = text.replace(place, instead)
        for record in EXPECTED:
            for key in ("message", "stack", "exception_message"):
                if key in record:
                    record[key] = record[key].replace(place, instead)
    path.write_bytes(text.encode())
    if not EXPECTED:
        split(path)
        return
    write(
        path, [{key: value for key, value in record.items() if key not in FREE or key in prints} for record in EXPECTED]
    )


def split(path: Path) -> None:
    """What the lines of somebody else's program say."""
    sys.path.insert(0, str(HERE))
    from split import events

    write(path, events(path))


def write(path: Path, records: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.with_suffix(".jsonl").write_text(lines, "utf-8")


if __name__ == "__main__":
    split(Path(sys.argv[2])) if sys.argv[1] == "--split" else main(sys.argv[1])
