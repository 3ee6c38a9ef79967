"""What is done with a process's output: a function of its settings and of where the output goes by itself.

What the user's own code prints to where the user expects it is never moved; only infra processes are redirected.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from skyrl_otel.capture import fds
from skyrl_otel.config import Channel, Config

#: What is done with fds 1 and 2: pointed at the spool; read in place; left alone (somebody else records them, or nobody).
Plan = Literal["redirect", "follow", "leave"]


class Surroundings(NamedTuple):
    """What `plan` decides by."""

    stdout: fds.Kind
    stderr: fds.Kind
    rank: int | None
    channel: Channel | None
    notebook: bool


def plan(config: Config, around: Surroundings) -> tuple[Plan, str]:
    """What to do with the output of a process that is no Ray worker, and a sentence for the user where it is not plain."""
    if config.capture == "redirect" and not around.notebook:
        return "redirect", ""
    if around.notebook:
        return "leave", "in a notebook cells keep their output; records only"
    infra = around.channel == "infra" or (around.channel is None and (around.rank or 0) > 0)
    if infra and config.capture == "auto" and not config.show_infra:
        return "redirect", ""
    if config.launched:
        return "leave", ""  # the launcher records what this process prints
    if "file" in (around.stdout, around.stderr):
        return "follow", ""
    where = "a terminal" if "terminal" in (around.stdout, around.stderr) else "a pipe"
    return "leave", f"output goes to {where} and stays there; records only (use `skyrl-otel run` to record it)"
