"""Real output, kept outside the tree for the test that reads all of it (`test_output.py`): `~/.cache/skyrl-otel/output/NAME`.

What the stack's tests ran (Ray's session, vLLM, the demo, otelcol, Loki) is kept by them, each time in the place of the last.
That is a few megabytes; `PROGRAMS` are installed ones that say much when asked to.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

OUTPUT = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skyrl-otel" / "output"
MOST_OF_ONE = 24_000_000  # so that no program is the whole measure
_SUFFIXES = (".log", ".out", ".err", ".txt", ".jsonl")

_TRACE = """
import importlib, sys, trace
tracer = trace.Trace(count=0, trace=1)
for name in ("typing", "argparse", "asyncio", "logging.config", "pydoc"):
    tracer.runfunc(importlib.import_module("pydoc").render_doc, name)
"""
# Name, command for sh; {python} is this environment's, {lib} where its packages are. None writes to the disk.
PROGRAMS: tuple[tuple[str, str], ...] = (
    ("python-imports", "{python} -v -c 'import ray, torch, aiohttp, textual'"),
    ("python-trace", f"{{python}} -c '{_TRACE}'"),
    ("dynamic-linker", "LD_DEBUG=all {python} -c 'import ray, aiohttp'"),
    ("torch-symbols", "readelf --wide --dyn-syms {lib}/torch/lib/libtorch_cpu.so"),
    ("checksums", "find {lib} -type f -size -1000k | xargs sha256sum"),
    ("files", "find / -xdev -ls"),
    ("mypy", "{python} -m mypy -v --cache-dir /dev/null"),
    ("go-build", "cd $(go env GOROOT)/src && go build -n -a std cmd"),
    ("go-packages", "cd $(go env GOROOT)/src && go list -deps -json std cmd"),
    ("debian-packages", "apt-cache dumpavail; cat /var/lib/dpkg/status"),
    ("ray-help", "for c in start stop job status logs; do {python} -m ray.scripts.scripts $c --help; done"),
    ("torch-disassembled", "objdump -d --no-show-raw-insn {lib}/torch/lib/libtorch_python.so"),
)


def keep(name: str, paths: Iterable[Path]) -> None:
    """Copy these files into the cache, in the place of what was kept by this name."""
    target, scratch = OUTPUT / name, OUTPUT / f".{name}.{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True, mode=0o700)
    for number, path in enumerate(sorted(paths)):
        try:
            if path.is_file() and not path.is_symlink() and path.stat().st_size:
                shutil.copyfile(path, scratch / f"{number}-{path.name}")
        except OSError:
            continue  # a spool's folder goes when it is delivered
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)


def output_below(root: Path) -> Iterator[Path]:
    """Text files, Ray's session logs and spools in a test's folder."""
    return (path for path in root.rglob("*") if path.suffix in _SUFFIXES or path.name in ("out", "err"))


def fill_up(name: str, command: str) -> None:
    """Run one of `PROGRAMS`, unless its output is kept already. What it says on stderr counts too."""
    target = OUTPUT / name / "output.txt"
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    import ray

    lib = Path(ray.__file__).parents[1]
    shell = command.replace("{python}", sys.executable).replace("{lib}", str(lib))
    scratch = target.with_suffix(f".{os.getpid()}")
    with scratch.open("wb") as file:
        # `find /` cannot look everywhere, a symbol table may be longer than we want: the exit status says nothing.
        subprocess.run(
            ["sh", "-c", f"({shell}) 2>&1 | head -c {MOST_OF_ONE}"], stdout=file, stdin=subprocess.DEVNULL, timeout=120
        )
    scratch.rename(target)
