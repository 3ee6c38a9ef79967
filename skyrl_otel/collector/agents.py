"""What each agent said last. Reports are for people and for the drain at a run's end; they never decide delivery."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

_MAX_AGENTS = 20_000


@dataclass(frozen=True, slots=True)
class Report:
    """An agent's last status. `fields` is its JSON object."""

    agent: str
    heard_unix_nano: int
    fields: dict[str, Any]

    @property
    def drained(self) -> bool:
        return self.fields.get("drained") is True

    def to_json(self) -> str:
        return json.dumps(self.fields, ensure_ascii=False, separators=(",", ":"))


class Agents:
    """All agents ever heard, by their id. Belongs to the event loop."""

    def __init__(self, now_monotonic: float) -> None:
        self._reports: dict[str, Report] = {}
        self._last_heard = now_monotonic

    def restore(self, agent: str, heard_unix_nano: int, status: str) -> None:
        """Take over what an earlier life heard."""
        self._reports[agent] = Report(agent, heard_unix_nano, json.loads(status))

    def hear(self, body: bytes, now_unix_nano: int, now_monotonic: float) -> Report:
        """Take a status report.

        Raises:
            ValueError: it is no status.
        """
        fields = json.loads(body)
        if (
            not isinstance(fields, dict)
            or not isinstance(agent := fields.get("agent"), str)
            or not 0 < len(agent) <= 128
        ):
            raise ValueError("a status is a JSON object with a string 'agent'")
        self._reports.pop(agent, None)
        report = self._reports[agent] = Report(agent, now_unix_nano, fields)
        if len(self._reports) > _MAX_AGENTS:
            del self._reports[next(iter(self._reports))]  # the one not heard for longest
        self._last_heard = now_monotonic
        return report

    def to_json(self, now_unix_nano: int) -> str:
        """A JSON array of the last statuses, each with `age_s`."""
        return json.dumps(
            [
                {**report.fields, "age_s": round(max(now_unix_nano - report.heard_unix_nano, 0) / 1e9, 3)}
                for report in self._reports.values()
            ]
        )

    def finished(self, now_monotonic: float, silence_s: float) -> bool:
        """Whether nobody is left: silent for `silence_s` and all drained, or, where one that still held bytes vanished,
        silent for six times that."""
        silent_s = now_monotonic - self._last_heard
        drained = all(report.drained for report in self._reports.values())
        return silent_s >= silence_s * (1 if drained else 6)
