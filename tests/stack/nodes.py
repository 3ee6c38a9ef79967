"""Two Ray nodes on one machine: network, mount, pid and host name of their own, a private /tmp and spool each.

A bridge joins them to a third address, this machine's own, where a collector can listen.

Needs root. Everything is made by `two_nodes` and removed at its end; whatever runs in a node dies with its pid namespace.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[2]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
HOST = "10.77.0.254"
NAMES = ("node-one", "node-two")
RAY_PORT = 6399

_NODE = """
set -eu
hostname {name}
mount --make-rprivate /
mkdir -p {base}/{name}/tmp {base}/{name}/spool {spool}
chmod 1777 {base}/{name}/tmp
chmod 700 {base}/{name}/spool {spool}
{keep}
mount --rbind {base}/{name}/tmp /tmp
mount --bind {base}/{name}/spool {spool}
ip link set lo up
{commands}
"""


@dataclass(frozen=True, slots=True)
class Nodes:
    """`base` is seen by the test and by both nodes; use it for nothing that a job would need a shared disk for."""

    base: Path

    def run(
        self, command: list[str], environment: dict[str, str], timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """Start a head on the first node, a worker on the second, run `command` on the first once both are there."""
        ray = f"{Path(sys.executable).parent}/ray"
        common = "--disable-usage-stats --num-cpus=2 --object-store-memory=100000000"
        head = f"""
{ray} start --head --node-ip-address={ADDRESSES[0]} --port={RAY_PORT} --include-dashboard=false \\
    --resources='{{"one": 8}}' {common} > {self.base}/head.log 2>&1
touch {self.base}/head
while [ ! -e {self.base}/worker ]; do sleep 0.2; done
{shlex.join(command)}
"""
        worker = f"""
while [ ! -e {self.base}/head ]; do sleep 0.2; done
{ray} start --address={ADDRESSES[0]}:{RAY_PORT} --node-ip-address={ADDRESSES[1]} \\
    --resources='{{"two": 8}}' {common} > {self.base}/worker.log 2>&1
touch {self.base}/worker
sleep 3600
"""
        env = {**os.environ, "RAY_AUTH_MODE": "disabled", **environment}
        other = self._start(1, worker, env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            first = self._start(0, head, env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            try:
                out, err = first.communicate(timeout=timeout_s)
            finally:
                first.kill()
                first.wait()
            return subprocess.CompletedProcess(command, first.returncode, out, err)
        finally:
            other.kill()
            other.wait()

    def _start(
        self, index: int, commands: str, env: dict[str, str], *, stdout: int, stderr: int
    ) -> subprocess.Popen[str]:
        spool = f"/var/tmp/skyrl-otel-{os.geteuid()}"
        keep = "\n".join(_kept_in(f"{self.base}/{NAMES[index]}/tmp"))
        script = _NODE.format(name=NAMES[index], base=self.base, spool=spool, keep=keep, commands=commands)
        namespaces = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        return subprocess.Popen(
            ["ip", "netns", "exec", _namespace(index), *namespaces, "bash", "-c", script],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
        )


def _kept_in(private_tmp: str) -> list[str]:
    """Commands that keep this checkout and its Python visible where they lie below /tmp themselves."""
    commands = []
    for path in sorted({str(_CHECKOUT), sys.prefix, sys.base_prefix}, key=len):
        if path.startswith("/tmp/"):
            place = shlex.quote(private_tmp + path.removeprefix("/tmp"))
            commands.append(f"mkdir -p {place} && mount --rbind {shlex.quote(path)} {place}")
    return commands


def _namespace(index: int) -> str:
    return f"skyrl-otel-{os.getpid()}-{index + 1}"


@contextmanager
def two_nodes() -> Iterator[Nodes]:
    """Raises CalledProcessError, with the tool's words, where the machine refuses namespaces."""
    base = Path(tempfile.mkdtemp(prefix="sk-nodes-", dir="/var/tmp"))
    bridge = f"sk{os.getpid() % 100000}"
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{HOST}/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for index, side in enumerate("ab"):
            inside, outside = f"{bridge}{side}", f"{bridge}{side}o"
            _ip("netns", "add", _namespace(index))
            _ip("link", "add", outside, "type", "veth", "peer", "name", inside)
            _ip("link", "set", outside, "master", bridge, "up")
            _ip("link", "set", inside, "netns", _namespace(index))
            _ip("-n", _namespace(index), "addr", "add", f"{ADDRESSES[index]}/24", "dev", inside)
            _ip("-n", _namespace(index), "link", "set", inside, "up")
        yield Nodes(base)
    finally:
        for index in range(2):
            subprocess.run(["ip", "netns", "del", _namespace(index)], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", bridge], check=False, capture_output=True)
        shutil.rmtree(base, ignore_errors=True)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"ip {' '.join(arguments)}: {done.stderr.strip()}; these tests need network namespaces (root)"
        )
