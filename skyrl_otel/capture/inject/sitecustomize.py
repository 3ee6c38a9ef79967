"""Runs first in every Python process under `skyrl-otel run`, by the PYTHONPATH entry that the launcher sets.

Cheap: nothing of ours is imported until the program imports ray, or is a rank of torchrun. Ray's own processes are left
alone, and the environment's own `sitecustomize`, which this file hides, is run at the end.
"""

import os
import stat
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))

# Parts of the paths and module names by which Ray starts its own Python processes: ray/_private/services.py.
_RAY_PROCESSES = ("/ray/_private/", "/ray/dashboard/", "/ray/autoscaler/", "/ray/core/", "ray.util.client.server")


def _is_rays_own() -> bool:
    return any(part in argument for argument in sys.orig_argv[1:4] for part in _RAY_PROCESSES)


class _BeforeRay:
    """Answers for no module. When ray is about to be imported, it hands over to our code and goes."""

    @staticmethod
    def find_spec(name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != "ray":
            return None
        sys.meta_path.remove(_BeforeRay)
        try:
            from skyrl_otel.capture.runtime import watch_imports

            return watch_imports(name, path, target)
        except Exception:
            return None


def _drop_strange_terminal() -> None:
    # A parent that closed its descriptors (subprocess does) passes the number on, but not what was behind it.
    number = os.environ.get("SKYRL_OTEL_TERMINAL_FD", "")
    if number:
        try:
            mode = os.fstat(int(number)).st_mode
            if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode):
                return
        except (OSError, ValueError):
            pass
        del os.environ["SKYRL_OTEL_TERMINAL_FD"]


def _start() -> None:
    if _is_rays_own() or not os.environ.get("SKYRL_OTEL_LAUNCHER"):
        return
    _drop_strange_terminal()
    sys.meta_path.insert(0, _BeforeRay)
    if os.environ.get("RANK", "").isdigit() and "SKYRL_OTEL_RANK_OF" not in os.environ:
        # Children of a rank inherit its descriptors, and with them its place in the spool.
        os.environ["SKYRL_OTEL_RANK_OF"] = str(os.getpid())
        if os.environ["RANK"] != "0":
            from skyrl_otel.capture.runtime import attach

            attach()


def _chain() -> None:
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    rest = [entry for entry in sys.path if os.path.abspath(entry or ".") != _HERE]
    spec = PathFinder.find_spec("sitecustomize", rest)
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


try:
    _start()
except Exception:
    if os.environ.get("SKYRL_OTEL_RAISE"):
        raise
_chain()
