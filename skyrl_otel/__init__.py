"""Every line of every process of a training run in one place, with who wrote it.

The public names; each is imported on first use, so that ``import skyrl_otel`` costs a training process nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skyrl_otel.capture.attach import attach as attach
    from skyrl_otel.capture.handler import OTelLogHandler as OTelLogHandler
    from skyrl_otel.capture.runtime import detach as detach
    from skyrl_otel.integrations.ray import runtime_env as runtime_env

__version__ = "0.1.0"

__all__ = ["OTelLogHandler", "__version__", "attach", "detach", "runtime_env"]

_HOME = {
    "OTelLogHandler": "skyrl_otel.capture.handler",
    "attach": "skyrl_otel.capture.attach",
    "detach": "skyrl_otel.capture.runtime",
    "runtime_env": "skyrl_otel.integrations.ray",
}


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
