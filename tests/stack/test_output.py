"""The built-in redaction rules on a hundred megabytes of what real programs print: not one match."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from skyrl_otel.agent.redact import Redactor
from tests.stack.output import OUTPUT, PROGRAMS, fill_up

ENOUGH = 100_000_000


def new_lines(seen: set[int]) -> Iterator[tuple[str, bytes]]:
    """(program, line) of all that is kept; a line that was there before does not count again."""
    for path in sorted(OUTPUT.glob("[!.]*/*")):
        with path.open("rb") as file:
            for line in file:
                if hash(line) not in seen:
                    seen.add(hash(line))
                    yield path.parent.name, line.rstrip(b"\n").replace(b"\0", b"")


@pytest.mark.long
@pytest.mark.timeout(600)
def test_no_false_alarm_in_a_hundred_megabytes_of_real_output() -> None:
    redactor = Redactor()
    seen: set[int] = set()
    sizes: Counter[str] = Counter()
    alarms: list[tuple[str, bytes]] = []

    def read() -> None:
        for program, line in new_lines(seen):
            sizes[program] += len(line)
            if redactor.text(line) != line:
                alarms.append((program, line[:300]))

    read()
    for name, command in PROGRAMS:
        if sizes.total() < ENOUGH:
            fill_up(name, command)
            read()
    print(f"{sizes.total() / 1e6:.0f} MB of different lines: {dict(sizes.most_common())}")
    assert not alarms
    assert sizes.total() >= ENOUGH
    assert max(sizes.values()) <= ENOUGH / 3, "one program is too much of it"
