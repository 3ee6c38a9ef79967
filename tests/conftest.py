"""What all tests share: a private spool root, a clean environment, and a closing word on what did not run."""

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

OUR_PREFIXES = ("OTEL_", "SKYRL_")

# No deadline per example: two cores shared with a Ray cluster are late for reasons that are not ours.
hypothesis.settings.register_profile("fuzz", max_examples=5_000, deadline=None, derandomize=False)
hypothesis.settings.register_profile("test", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("test")

deselected: Counter[str] = Counter()


@pytest.fixture(autouse=True)
def _environment_without_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The developer's own endpoint and spool must not decide what a test sees."""
    for name in [name for name in os.environ if name.startswith(OUR_PREFIXES)]:
        monkeypatch.delenv(name)


@pytest.fixture
def spool_root() -> Iterator[Path]:
    """A private folder with a short path (a socket's path has 107 bytes) on a disk that can flock and punch."""
    root = Path(tempfile.mkdtemp(prefix="sk-", dir="/var/tmp"))
    yield root
    shutil.rmtree(root, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those with a cluster first: they are the longest, and a worker that begins one last keeps the others waiting."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


def pytest_deselected(items: list[pytest.Item]) -> None:
    deselected.update(map(_what_it_needs, items))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands over what it was told to leave out; all workers were told the same."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["deselected"] = dict(deselected)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    if not deselected:
        deselected.update(getattr(node, "workeroutput", {}).get("deselected", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Names every test that did not run, by reason, so that a green run cannot hide a hole."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.getreports("skipped"))
    if not reasons and not deselected:
        return
    terminalreporter.section("did not run")
    for reason, count in sorted(reasons.items()):
        terminalreporter.line(f"{count:5} {reason[:1].lower()}{reason[1:]}")
    for needs, count in sorted(deselected.items()):
        terminalreporter.line(f"{count:5} deselected: {needs}")


def _what_it_needs(item: pytest.Item) -> str:
    stack = [name for name in ("netns", "collector", "loki", "vllm", "long") if item.get_closest_marker(name)]
    return f"needs {', '.join(stack)} (make test-stack)" if stack else "not chosen by this command line"
