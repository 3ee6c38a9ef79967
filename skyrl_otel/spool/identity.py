"""Identity lines: who a writer is, as far as it knows by now.

One JSON object a line, one write(2) each: ``{"seq": 0, "sizes": {"out": [0, 4711]}, "set": {"role": "policy"}}``.
The identity in force is the union of all lines so far; `docs/contracts.md` lists the keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple


class IdentityLine(NamedTuple):
    """`sizes` maps a file's name to (generation, size in bytes) at the moment of writing."""

    seq: int
    sizes: Mapping[str, tuple[int, int]]
    changes: Mapping[str, Any]


def encode(line: IdentityLine) -> bytes:
    sizes = {name: list(size) for name, size in line.sizes.items()}
    return json.dumps({"seq": line.seq, "sizes": sizes, "set": dict(line.changes)}).encode() + b"\n"


def parse(data: bytes) -> list[IdentityLine]:
    """The whole lines in `data`; what a kill tore or a stranger wrote is passed over."""
    lines = []
    for raw in data.split(b"\n")[:-1]:
        try:
            fields = json.loads(raw)
            sizes = {str(name): (int(gen), int(size)) for name, (gen, size) in fields["sizes"].items()}
            lines.append(IdentityLine(int(fields["seq"]), sizes, dict(fields["set"])))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return lines


def in_force(lines: list[IdentityLine], seq: int) -> dict[str, Any]:
    """The union of all lines up to `seq`; a null removes a key."""
    facts: dict[str, Any] = {}
    for line in lines:
        if line.seq <= seq:
            facts.update(line.changes)
    return {key: value for key, value in facts.items() if value is not None}
