"""An actor whose module imports vLLM, as SkyRL's `vllm_server_actor` does: before it becomes an actor."""

from __future__ import annotations

from tests.stack.programs.vllm_speaker import PRINTED, SKYRL, VLLM, say

say("server, importing", VLLM, *PRINTED)

import vllm  # noqa: E402

say("server, imported", VLLM, "print", "log:vllm.server")


class Server:
    """Its first record as an actor is SkyRL's; it is an engine all the same."""

    def __init__(self) -> None:
        say("server", SKYRL, "log:skyrl.inference_servers")
        say("server", VLLM, *PRINTED, "log:vllm.server")

    def version(self) -> str:
        return vllm.__version__
