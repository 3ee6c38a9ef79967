"""``python -m skyrl_otel.collector``: what the launcher and a driver start; people use ``skyrl-otel collector``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from skyrl_otel.collector import node_ip
from skyrl_otel.collector.service import Settings, main
from skyrl_otel.config import Config
from skyrl_otel.spool.layout import RunDir


def settings(argv: list[str]) -> Settings:
    """What the options and the environment ask for."""
    config = Config.from_env()
    parser = argparse.ArgumentParser("python -m skyrl_otel.collector")
    parser.add_argument("--run-dir", type=Path, required=True, help="the run's folder in the spool")
    parser.add_argument("--log-dir", type=Path, default=config.log_dir)
    parser.add_argument("--host", default=config.node_ip, help="the one address to listen on; default: the node's")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--control-only", action="store_true", help="take statuses, no records")
    parser.add_argument("--exit-when-drained", action="store_true", help="end when no agent is left")
    parser.add_argument("--silence-s", type=float, default=600.0, help="how long no agent must have spoken for that")
    parser.add_argument("--store-max-bytes", type=int, default=config.store_max_bytes)
    parser.add_argument("--keeper", type=json.loads, default=[], help="who restarts this process: a command in JSON")
    given = parser.parse_args(argv)
    return Settings(
        run=RunDir(given.run_dir.absolute(), given.run_dir.name),
        log_dir=given.log_dir.expanduser().absolute(),
        host=node_ip.find(os.environ, given=given.host),
        port=given.port,
        control_only=given.control_only,
        exit_when_drained=given.exit_when_drained,
        silence_s=given.silence_s,
        settings_file=config.settings_file,
        keeper=tuple(given.keeper),
        store_max_bytes=given.store_max_bytes,
    )


if __name__ == "__main__":
    sys.exit(main(settings(sys.argv[1:])))
