"""The embedded collector of a driver that nobody launched: a process of its own that outlives the driver.

    python -c … RUN_PATH LOG_DIR        (started by `capture/launch.py`)

It keeps the run's collector alive as `skyrl-otel run` would, and ends when that one finds nobody left to serve: every agent
has delivered and none has spoken for ten minutes. It and the collector start each other anew, as an agent's two processes
do; if both are killed, the driver's watch thread starts them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

from skyrl_otel.collector import node_ip
from skyrl_otel.config import Config
from skyrl_otel.spool import layout, leftovers
from skyrl_otel.spool.layout import RunDir
from skyrl_otel.terminal.supervise import Collector, hand_out_token


def main(run_path: str, log_dir: str) -> None:
    """Daemonise and keep the collector. The calling process returns from here and may exit."""
    run = RunDir(Path(run_path), Path(run_path).name)
    if os.fork():
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    os.umask(0o077)
    os.chdir("/")
    os.closerange(3, 65536)
    for name in (signal.SIGINT, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    config = Config.from_env()._replace(log_dir=Path(log_dir))
    layout.ensure_private_dir(run.store)
    log = layout.open_file(run.store / "collector.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    collector = Collector(
        run,
        config.log_dir,
        lambda: node_ip.find(os.environ, given=config.node_ip),
        control_only=False,
        keeper=[sys.executable, *sys.orig_argv[1:]],
        mask=(),
        on_ready=lambda ready: hand_out_token(run, config, ready),
        on_failure=lambda why: print(why, file=sys.stderr),
    )
    signal.signal(signal.SIGTERM, lambda *_: collector.stop())
    collector.start()
    while collector.is_alive():  # a join without end would keep SIGTERM waiting
        collector.join(0.5)
    with contextlib.suppress(OSError):
        leftovers.settle_as_last(run)
