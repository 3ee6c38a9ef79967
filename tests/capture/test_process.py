"""What a host process sees of us, and what is left of it in the spool: threads, forks, kills, exits, a full disk."""

import os
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from tests.capture.conftest import Host, environment, written

ATTACH = "import skyrl_otel; skyrl_otel.attach(role='policy', rank=3, channel='infra')\n"


def test_invariant_4_lines_of_four_threads_are_never_torn(host: Host, spool: Path) -> None:
    host(
        ATTACH
        + """
import threading
def work(name):
    for i in range(3000):
        print("thread", name, "line", i)
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
"""
    )
    [folder] = written(spool)
    lines = Counter(folder.text().splitlines())
    assert lines == Counter(f"thread {n} line {i}".encode() for n in range(4) for i in range(3000))


def test_streams_children_and_native_code_go_where_they_belong(host: Host, spool: Path) -> None:
    done = host(
        ATTACH
        + """
import os, sys, ctypes, subprocess
print("printed"); print("to stderr", file=sys.stderr)
os.write(1, b"raw\\n")
ctypes.CDLL(None).puts(b"native")
subprocess.run(["sh", "-c", "echo child; echo child-err >&2"])
"""
    )
    assert (done.stdout, done.stderr) == (b"", b"")
    [folder] = written(spool)
    assert folder.text().splitlines() == [b"printed", b"raw", b"native", b"child"]
    assert folder.text("err").splitlines() == [b"to stderr", b"child-err"]
    assert folder.facts["role"] == "policy" and folder.facts["rank"] == 3 and folder.facts["channel"] == "infra"
    assert folder.facts["goodbye"] == {"code": None}


def test_invariant_2_what_write_accepted_survives_sigkill(host: Host, spool: Path) -> None:
    done = host(
        ATTACH
        + """
import os, ctypes, signal
libc = ctypes.CDLL(None)
for i in range(100):
    print("python", i); libc.printf(b"native %d\\n", i)
os.kill(os.getpid(), signal.SIGKILL)
""",
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    [folder] = written(spool)
    assert len(folder.text().splitlines()) == 200
    assert "goodbye" not in folder.facts


def test_os_exit_keeps_whole_lines_and_an_uncaught_exception_is_a_clean_end(host: Host, spool: Path) -> None:
    host(ATTACH + "import os; print('last'); os._exit(0)")
    [folder] = written(spool)
    assert folder.text() == b"last\n"
    done = host(ATTACH + "print('no end', end=''); 1/0", check=False)
    assert done.returncode == 1
    second = next(f for f in written(spool) if f.path != folder.path)
    assert second.text() == b"no end"
    assert b"ZeroDivisionError" in second.text("err")
    assert second.facts["goodbye"] == {"code": 1}


def test_partial_text_goes_out_by_itself(host: Host, spool: Path) -> None:
    host(
        ATTACH
        + """
import os, sys, time
print("waiting ...", end="")
deadline = time.monotonic() + 10
while os.fstat(1).st_size == 0:
    assert time.monotonic() < deadline
    time.sleep(0.01)
os._exit(0)
"""
    )
    [folder] = written(spool)
    assert folder.text() == b"waiting ..."


def test_a_fork_within_a_line_writes_it_once(host: Host, spool: Path) -> None:
    host(
        ATTACH
        + """
import os, threading
held = threading.Event(); go = threading.Event()
def other():
    print("other thread", end=" "); held.set(); go.wait(); print("ends")
thread = threading.Thread(target=other); thread.start(); held.wait()
print("before", end=" ")
pid = os.fork()
if pid == 0:
    print("child")
    import sys; sys.exit(0)      # runs the exit handlers it inherited
os.waitpid(pid, 0)
print("parent")
go.set(); thread.join()
"""
    )
    [folder] = written(spool)
    text = folder.text()
    assert text.count(b"before ") == text.count(b"other thread ") == 1
    assert b"child\n" in text and b"parent\n" in text and text.count(b"ends\n") == 1
    goodbyes = [line for line in folder.lines if "goodbye" in line["set"]]
    assert len(goodbyes) == 1


def test_a_print_in_a_signal_handler_does_not_deadlock(host: Host, spool: Path) -> None:
    host(
        ATTACH
        + """
import signal, time
signal.signal(signal.SIGALRM, lambda *_: print("handler"))
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
end = time.monotonic() + 1
while time.monotonic() < end:
    print("loop", end=""); print("")
signal.setitimer(signal.ITIMER_REAL, 0)
""",
        timeout=20,
    )
    [folder] = written(spool)
    # A handler runs within the line it interrupts, as it does without us; nothing is lost by it.
    text = folder.text()
    assert text.count(b"handler") > 10 and not text.replace(b"handler", b"").replace(b"loop", b"").strip()


KEEP = """
import ctypes, os, threading, time
libc = ctypes.CDLL(None)
kept = [ctypes.c_void_p.in_dll(libc, name) for name in {streams}]
held = threading.Event()
def keep():
    for stream in kept: libc.flockfile(stream)
    held.set(); libc.getc(ctypes.c_void_p.in_dll(libc, "stdin"))
threading.Thread(target=keep, daemon=True).start(); held.wait()
"""


@pytest.mark.parametrize("channel", ["infra", "progress"])
@pytest.mark.parametrize("streams", [("stdin",), ("stdin", "stdout", "stderr")])
def test_invariant_1_a_native_thread_within_stdio_holds_up_nothing(
    host: Host, channel: str, streams: tuple[str, ...]
) -> None:
    """It keeps the lock of its FILE until somebody writes to us: neither attach and detach nor our part of the exit waits."""
    # With stdout's lock taken Python's own exit never ends: it calls fflush(stdout) behind the exit handlers.
    end = "" if len(streams) == 1 else "import atexit; atexit._run_exitfuncs(); os._exit(0)"
    attach = f"skyrl_otel.attach(channel={channel!r})"
    reader, writer = os.pipe()
    try:
        host(
            KEEP.format(streams=streams)
            + f"import skyrl_otel; {attach}; skyrl_otel.detach(); {attach}; print('printed')\n{end}",
            stdin=reader,
            timeout=20,
        )
    finally:
        os.close(reader)
        os.close(writer)


def test_invariant_1_a_thread_in_input_does_not_keep_the_process(spool: Path) -> None:
    script = """
import ctypes, sys, threading
threading.Thread(target=input, daemon=True).start()
libc = ctypes.CDLL(None); stdin = ctypes.c_void_p.in_dll(libc, "stdin")
while libc.ftrylockfile(stdin) == 0: libc.funlockfile(stdin)
"""
    master, slave = os.openpty()
    try:
        subprocess.run(
            [sys.executable, "-c", "import skyrl_otel; skyrl_otel.attach()\n" + script],
            env=environment(spool),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            check=True,
            timeout=20,
        )
    finally:
        os.close(slave)
        os.close(master)


def test_invariant_1_a_child_forked_right_after_attach_can_import(host: Host) -> None:
    """No thread of ours is within an import then, whose lock would be closed in the child for ever."""
    for delay_s in (0, 0.0005, 0.001, 0.002, 0.003, 0.005) * 2:
        host(
            ATTACH
            + f"""
import os, signal, time
time.sleep({delay_s})
pid = os.fork()
if pid == 0:
    signal.alarm(5)
    import subprocess
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""
        )


def test_attach_twice_is_once_and_detach_puts_everything_back(host: Host, spool: Path) -> None:
    done = host(
        """
import os, sys, threading, skyrl_otel
before = sys.stdout, sys.stderr, os.fstat(1).st_ino, os.fstat(2).st_ino
threads = [threading.Thread(target=skyrl_otel.attach, kwargs={"channel": "infra"}) for _ in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
print("recorded")
skyrl_otel.attach(role="late")
skyrl_otel.detach(); skyrl_otel.detach()
assert before == (sys.stdout, sys.stderr, os.fstat(1).st_ino, os.fstat(2).st_ino)
print("shown")
skyrl_otel.attach(channel="infra")
print("recorded again")
"""
    )
    assert done.stdout == b"shown\n"
    folders = written(spool)
    assert {f.text() for f in folders} == {b"recorded again\n", b"recorded\n"}
    assert next(f for f in folders if f.text() == b"recorded\n").facts["role"] == "late"


def test_a_refused_spool_is_one_line_and_output_stays(host: Host, spool: Path) -> None:
    os.chmod(spool, 0o755)
    done = host(ATTACH + "print('goes on')")
    assert done.stdout == b"goes on\n"
    assert done.stderr.count(b"\n") == 1 and b"0755" in done.stderr and b"not recorded" in done.stderr


def test_a_bad_setting_is_one_line(host: Host) -> None:
    done = host(
        "import skyrl_otel; skyrl_otel.attach(channel='progress'); print('goes on')",
        env={"OTEL_EXPORTER_OTLP_ENDPOINT": "localhost:4318"},
    )
    assert done.stdout == b"goes on\n"
    assert b"OTEL_EXPORTER_OTLP_ENDPOINT='localhost:4318' has no scheme" in done.stderr.splitlines()[0]


def test_disabled_or_off_does_nothing(host: Host, spool: Path) -> None:
    for env in ({"OTEL_SDK_DISABLED": "true"}, {"SKYRL_OTEL_CAPTURE": "off"}):
        assert host(ATTACH + "print('shown')", env=env).stdout == b"shown\n"
    assert written(spool) == []


def test_a_lone_driver_with_a_file_is_followed_and_one_with_a_pipe_keeps_it(
    host: Host, spool: Path, tmp_path: Path
) -> None:
    script = "import skyrl_otel; print('before', flush=True); skyrl_otel.attach(); print('after')"
    with open(tmp_path / "log", "wb") as log:
        host(script, stdout=log, stderr=subprocess.STDOUT)
    assert (tmp_path / "log").read_bytes() == b"before\nafter\n"
    [folder] = written(spool)
    follow = folder.facts["follow"]
    assert set(follow) == {"out"} and follow["out"]["offset"] == 7
    assert follow["out"]["ino"] == os.stat(tmp_path / "log").st_ino
    done = host(script)
    assert done.stdout == b"before\nafter\n"
    assert b"records only" in done.stderr


def test_a_terminal_stays_a_terminal(spool: Path) -> None:
    master, slave = os.openpty()
    script = ATTACH.replace("'infra'", "'progress'") + "import sys; print('colours:', sys.stdout.isatty())"
    subprocess.run([sys.executable, "-c", script], env=environment(spool), stdout=slave, stderr=slave, check=True)
    os.close(slave)
    shown = os.read(master, 4096)
    os.close(master)
    assert b"colours: True" in shown and shown.count(b"\r\n") == 2 and b"a terminal and stays there" in shown


def test_the_rank_is_published_when_it_appears(host: Host, spool: Path) -> None:
    host(
        """
import os, skyrl_otel, time
from skyrl_otel.capture import runtime
skyrl_otel.attach(channel="infra")
os.environ.update(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1")
deadline = time.monotonic() + 10
while "rank" not in runtime.current().facts:
    assert time.monotonic() < deadline
    time.sleep(0.02)
"""
    )
    [folder] = written(spool)
    assert {key: folder.facts[key] for key in ("rank", "world_size", "local_rank", "awaits")} == {
        "rank": 5,
        "world_size": 8,
        "local_rank": 1,
        "awaits": "",
    }


def test_init_process_group_tells_the_rank_at_once(host: Host, spool: Path, tmp_path: Path) -> None:
    package = tmp_path / "torch" / "distributed"
    package.mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").touch()
    (package / "__init__.py").write_text(
        textwrap.dedent("""
        _up = False
        def init_process_group(backend=None):
            global _up
            _up = True
            return backend
        def is_initialized(): return _up
        def get_rank(): return 2
        def get_world_size(): return 4
        """)
    )
    host(
        f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import skyrl_otel
skyrl_otel.attach(channel="infra")
from torch.distributed import init_process_group
import torch.distributed
assert torch.distributed.__spec__.loader.__class__.__name__ == "SourceFileLoader"
assert init_process_group("gloo") == "gloo"
from skyrl_otel.capture import runtime
assert runtime.current().facts["rank"] == 2
"""
    )
    [folder] = written(spool)
    assert (folder.facts["rank"], folder.facts["world_size"]) == (2, 4)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_spool_disk_does_not_harm_the_host(host: Host, tmp_path: Path) -> None:
    done = host(
        f"""
import os, subprocess
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "tmpfs", {str(tmp_path)!r}], check=True)
import skyrl_otel
skyrl_otel.attach(channel="infra")
for i in range(200):
    print("line", i)
print("x" * 400_000)  # more than the disk, at once: no agent can make room for it in time
from skyrl_otel.capture import guard
lost = guard.counts["stream.lost_bytes"]
skyrl_otel.detach()
assert lost > 0
print("went on")
""".replace(
            "import os, subprocess\n",
            "import os, subprocess, ctypes; ctypes.CDLL(None).unshare(0x20000)\n"
            "subprocess.run(['mount', '--make-rprivate', '/'], check=True)\n",
        ),
        env={"SKYRL_OTEL_SPOOL_DIR": str(tmp_path), "SKYRL_OTEL_ALLOW_TMPFS": "1", "SKYRL_OTEL_RAISE": ""},
    )
    assert done.stdout == b"went on\n"


def test_a_forked_child_that_gets_no_folder_says_so_once(host: Host, spool: Path) -> None:
    host(
        ATTACH
        + f"""
import logging, os
os.chmod({str(spool)!r}, 0o755)
pid = os.fork()
if pid == 0:
    for number in range(3): logging.warning("lost %d", number)
    os._exit(0)
os.waitpid(pid, 0)
print(pid)
"""
    )
    [folder] = written(spool)
    child = int(folder.text())
    said = [line for line in folder.text("err").splitlines() if b"skyrl-otel" in line]
    assert len(said) == 1 and f"records of the forked process {child} are lost".encode() in said[0]


def test_a_launcher_that_nobody_has_reaped_is_no_warning_of_the_programs(host: Host) -> None:
    script = (
        "import sys; from skyrl_otel.capture import launch\n"
        "launch._launchers.append(launch._Started([sys.executable, '-c', '']))"
    )
    assert host(script, env={"PYTHONDEVMODE": "1"}).stderr == b""
    assert b"ResourceWarning" in host(script.replace("_Started", "subprocess.Popen"), env={"PYTHONDEVMODE": "1"}).stderr
