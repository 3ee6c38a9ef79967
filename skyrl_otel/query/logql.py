"""A filter as LogQL, with the meaning it has for the store: names are SQLite globs, ids may be given by their beginning."""

from __future__ import annotations

import json
import re

from skyrl_otel.query.filters import Filter

_LITERAL = re.compile(r"[\w \-:,;=<>/@#%&'\"!~]+")


def of(wanted: Filter, run_id: str) -> str:
    """The log query; `grep` is only narrowed down here, for Loki's regular expressions are not Python's."""
    return selector(run_id, wanted.channel) + _pipeline(wanted)


def selector(run_id: str, channel: str = "") -> str:
    """The streams of a run. What has no channel is infra."""
    channels = {"": "", "infra": ', skyrl_channel!="progress"'}.get(channel, f", skyrl_channel={quote(channel)}")
    return f"{{skyrl_run_id={quote(run_id)}{channels}}}"


def quote(text: str) -> str:
    """A LogQL string; its escapes are Go's, and JSON's are among them (Go has no `\\/`, and JSON never writes it)."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\x7f")


def glob(pattern: str) -> str:
    """What SQLite's GLOB matches, or the text itself, as an anchored regular expression of RE2 and Python alike."""
    return f"(?s:{_escape(pattern)}|{_translated(pattern)})"


def _pipeline(wanted: Filter) -> str:
    stages = []
    if wanted.grep is not None and not wanted.grep.flags & re.IGNORECASE and _LITERAL.fullmatch(wanted.grep.pattern):
        stages.append(f"|= {quote(wanted.grep.pattern)}")
    if wanted.actor:
        name, begins = quote(glob(wanted.actor)), quote(f"(?s:{_escape(wanted.actor)}.*)")
        stages.append(f"| (ray_actor_name=~{name} or ray_actor_class=~{name} or ray_actor_id=~{begins})")
    if wanted.role:
        stages.append(f"| skyrl_role=~{quote(glob(wanted.role))}")
    if wanted.rank is not None:
        stages.append(f"| skyrl_rank={quote(str(wanted.rank))}")
    if wanted.node:
        begins = quote(f"(?s:{_escape(wanted.node)}.*)")
        stages.append(f"| (host_name=~{quote(glob(wanted.node))} or ray_node_id=~{begins})")
    if wanted.stream:
        stages.append(f"| log_iostream={quote(wanted.stream)}")
    return "".join(f" {stage}" for stage in stages)


def _escape(text: str) -> str:
    # Python's own also escapes characters that RE2 refuses to see escaped, such as a space.
    return re.sub(r"[\\.+*?()|\[\]{}^$]", r"\\\g<0>", text)


def _translated(pattern: str) -> str:
    out = []
    position = 0
    while position < len(pattern):
        character = pattern[position]
        position += 1
        if character == "*":
            out.append(".*")
        elif character == "?":
            out.append(".")
        elif character == "[":
            # SQLite: "^" negates, "]" as the first member is itself. Without an end nothing matches.
            start = position + (pattern[position : position + 1] == "^")
            end = pattern.find("]", start + 1)
            if end < 0:
                return "[^\\s\\S]"
            members = re.sub(r"[\\\[\]^&~|]", r"\\\g<0>", pattern[start:end])
            out.append(f"[{'^' if start > position else ''}{members}]")
            position = end + 1
        else:
            out.append(_escape(character))
    return "".join(out)
