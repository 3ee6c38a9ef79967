"""A spool in a hostile /var/tmp is refused, with a sentence that says which path, why, and what to do."""

import os
import subprocess
import threading
from pathlib import Path

import pytest

from skyrl_otel.spool import layout
from skyrl_otel.spool.layout import SpoolRefused


def test_folders_are_ours_alone(spool_root: Path) -> None:
    os.umask(0o000)
    run = layout.open_run(spool_root / "root", "run-1")
    layout.write_run_file(run, project="p", log_dir="/logs", argv=["a"])
    assert run.path.stat().st_mode & 0o777 == 0o700
    assert run.path.parent.stat().st_mode & 0o777 == 0o700
    assert run.run_file.stat().st_mode & 0o777 == 0o600
    os.umask(0o022)


def test_the_first_run_file_wins(spool_root: Path) -> None:
    run = layout.open_run(spool_root, "r")
    layout.write_run_file(run, project="first", log_dir="", argv=[])
    before = run.run_file.read_bytes()
    layout.write_run_file(run, project="second", log_dir="", argv=[])
    assert run.run_file.read_bytes() == before
    assert [p.name for p in run.path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".hidden", "x" * 81, "a b", "a\n"])
def test_a_run_id_is_a_plain_name(spool_root: Path, name: str) -> None:
    with pytest.raises(SpoolRefused, match="no plain name"):
        layout.open_run(spool_root, name)


def test_a_link_in_place_of_the_root_is_refused(spool_root: Path) -> None:
    (spool_root / "victim").mkdir(mode=0o700)
    (spool_root / "root").symlink_to(spool_root / "victim")
    with pytest.raises(SpoolRefused, match="not a folder"):
        layout.open_run(spool_root / "root", "r")
    assert not list((spool_root / "victim").iterdir())


def test_a_root_open_to_others_is_refused(spool_root: Path) -> None:
    (spool_root / "root").mkdir(mode=0o755)
    with pytest.raises(SpoolRefused, match=r"mode 0755.*chmod 0700"):
        layout.open_run(spool_root / "root", "r")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_root_of_another_user_is_refused(spool_root: Path) -> None:
    (spool_root / "root").mkdir(mode=0o700)
    os.chown(spool_root / "root", 12345, 12345)
    with pytest.raises(SpoolRefused, match="belongs to uid 12345"):
        layout.open_run(spool_root / "root", "r")


def test_files_behind_links_are_not_opened(spool_root: Path) -> None:
    (spool_root / "victim").write_text("precious")
    (spool_root / "token").symlink_to(spool_root / "victim")
    with pytest.raises(OSError):
        layout.read_file(spool_root / "token")
    layout.replace_file(spool_root / "token", b"new")
    assert (spool_root / "victim").read_text() == "precious"


def test_a_good_disk_passes_the_probe(spool_root: Path) -> None:
    layout.check_disk(spool_root, allow_tmpfs=False)
    assert list(spool_root.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a tmpfs")
def test_memory_is_refused_unless_chosen(spool_root: Path) -> None:
    mount = spool_root / "m"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], check=True)
    try:
        with pytest.raises(SpoolRefused, match=r"tmpfs.*SKYRL_OTEL_ALLOW_TMPFS=1"):
            layout.check_disk(mount, allow_tmpfs=False)
        layout.check_disk(mount, allow_tmpfs=True)
        with pytest.raises(OSError):
            (mount / "fill").write_bytes(b"x" * (2 << 20))
        with pytest.raises(SpoolRefused, match="the disk is full"):
            layout.check_disk(mount, allow_tmpfs=True)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_an_unwritable_parent_names_the_way_out() -> None:
    with pytest.raises(SpoolRefused, match="SKYRL_OTEL_SPOOL_DIR"):
        layout.open_run(Path("/proc/no/such"), "r")


def test_newest_run_first(spool_root: Path) -> None:
    for name in ("a", "b", "c"):
        layout.write_run_file(layout.open_run(spool_root, name), project="", log_dir="", argv=[])
    assert [run.run_id for run in layout.existing_runs(spool_root)] == ["c", "b", "a"]
    assert layout.existing_runs(spool_root / "none") == []


def test_two_threads_may_replace_a_file_at_once(spool_root: Path) -> None:
    path = spool_root / "token"
    failures: list[OSError] = []

    def replace() -> None:
        for _ in range(300):
            try:
                layout.replace_file(path, b"x" * 100)
            except OSError as error:
                failures.append(error)

    threads = [threading.Thread(target=replace) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert path.read_bytes() == b"x" * 100 and len(list(spool_root.iterdir())) == 1
