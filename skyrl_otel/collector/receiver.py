"""The HTTP side: who may speak, how much, how long, and what the answer says.

OTLP/HTTP as in the OpenTelemetry Protocol specification: protobuf bodies, gzip or identity; 2xx only for what is
committed, 429 and 503 with Retry-After for what should come again, 4xx for what should not. Every path needs the token.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from aiohttp import web

from skyrl_otel.collector.agents import Agents
from skyrl_otel.collector.body import Malformed, TooLarge, gunzip
from skyrl_otel.collector.committer import Committer, Unavailable
from skyrl_otel.collector.decode import BadRequest, decode, parse_low_water

LOW_WATER_HEADER = "skyrl-otel-low-water"
_PROTOBUF = "application/x-protobuf"
_STATUS_LIMIT = 256 << 10


@dataclass(frozen=True, slots=True)
class Limits:
    """What one sender, and all together, may take. Sizes in bytes, times in seconds."""

    body_bytes: int = 64 << 20
    buffered_bytes: int = 256 << 20
    requests: int = 64
    wait_s: float = 2.0
    head_s: float = 10.0
    body_s: float = 30.0
    keepalive_s: float = 600.0


class Receiver:
    """The routes. `committer` is None for a listener that takes statuses only."""

    def __init__(self, token: str, committer: Committer | None, agents: Agents, limits: Limits) -> None:
        self._authorization = f"Bearer {token}".encode()
        self._committer = committer
        self._agents = agents
        self._limits = limits
        self._slots = asyncio.Semaphore(limits.requests)
        self._buffered_bytes = 0
        # One thread: decoding holds the GIL, so a second would only take turns with the first.
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="decoder")
        self._silent: set[asyncio.Protocol] = set()

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._authorize])
        app.router.add_post("/v1/logs", self._logs)
        app.router.add_post("/v1/status", self._status)
        app.router.add_get("/v1/agents", self._list_agents)
        return app

    def guard(self, factory: Callable[[], asyncio.Protocol]) -> Callable[[], asyncio.Protocol]:
        """A protocol factory that hangs up on a connection which sends no complete head in time. aiohttp bounds the
        pause between two requests, but not the wait for the first."""
        loop = asyncio.get_running_loop()

        def make() -> asyncio.Protocol:
            protocol = factory()
            self._silent.add(protocol)
            loop.call_later(self._limits.head_s, self._hang_up, protocol)
            return protocol

        return make

    def close(self) -> None:
        self._decoder.shutdown()

    def _hang_up(self, protocol: asyncio.Protocol) -> None:
        if protocol in self._silent:
            self._silent.discard(protocol)
            if isinstance(protocol, web.RequestHandler):
                protocol.force_close()

    @web.middleware
    async def _authorize(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        self._silent.discard(request.protocol)
        given = request.headers.get("authorization", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, self._authorization):
            return _answer(401, "the bearer token is missing or wrong", {"WWW-Authenticate": "Bearer"})
        return await handler(request)

    async def _logs(self, request: web.Request) -> web.Response:
        if self._committer is None:
            return _answer(404, "this listener takes agent statuses only")
        if request.content_type != _PROTOBUF:
            return _answer(415, f"content type {request.content_type!r} is not taken; send {_PROTOBUF}")
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("identity", "gzip", ""):
            return _answer(415, f"content encoding {encoding!r} is not taken; send gzip or identity")
        try:
            await asyncio.wait_for(self._slots.acquire(), self._limits.wait_s)
        except asyncio.TimeoutError:
            return _busy()
        try:
            return await self._store(request, encoding == "gzip", self._committer)
        finally:
            self._slots.release()

    async def _store(self, request: web.Request, compressed: bool, committer: Committer) -> web.Response:
        held = 0
        try:
            chunks: list[bytes] = []
            async with _deadline(self._limits.body_s):
                while chunk := await request.content.readany():
                    chunks.append(chunk)
                    held += len(chunk)
                    self._buffered_bytes += len(chunk)
                    if held > self._limits.body_bytes:
                        return _answer(
                            413, f"the body has more than {self._limits.body_bytes} bytes; send smaller batches"
                        )
                    if self._buffered_bytes > self._limits.buffered_bytes and self._buffered_bytes > held:
                        return _busy()
            body = b"".join(chunks)
            chunks.clear()
            low_water = parse_low_water(request.headers.get(LOW_WATER_HEADER, ""))
            loop = asyncio.get_running_loop()
            done = await loop.run_in_executor(self._decoder, self._decode, body, compressed, low_water, committer)
            await asyncio.wrap_future(done)
        except asyncio.TimeoutError:
            return _answer(408, f"the body did not arrive within {self._limits.body_s:g} s")
        except TooLarge as error:
            return _answer(413, str(error))
        except (Malformed, BadRequest) as error:
            return _answer(400, str(error))
        except web.RequestPayloadError as error:
            return _answer(400, f"the body is broken: {error}")
        except Unavailable as error:
            return _answer(503, str(error), {"Retry-After": "5"})
        finally:
            self._buffered_bytes -= held
        # An ExportLogsServiceResponse without a partial success is empty.
        return web.Response(content_type=_PROTOBUF)

    def _decode(self, body: bytes, compressed: bool, low_water: dict[str, int], committer: Committer) -> Future[None]:
        plain = gunzip(body, self._limits.body_bytes) if compressed else body
        return committer.submit(decode(plain, low_water=low_water, now_unix_nano=time.time_ns()))

    async def _status(self, request: web.Request) -> web.Response:
        body = b""
        try:
            async with _deadline(self._limits.body_s):
                while chunk := await request.content.readany():
                    body += chunk
                    if len(body) > _STATUS_LIMIT:
                        return _answer(413, f"a status has at most {_STATUS_LIMIT} bytes")
            report = self._agents.hear(body, time.time_ns(), time.monotonic())
        except asyncio.TimeoutError:
            return _answer(408, "the status did not arrive in time")
        except (ValueError, RecursionError) as error:
            return _answer(400, f"no status: {error}")
        if self._committer is not None:
            self._committer.report(report.agent, report.heard_unix_nano, report.to_json())
        return web.Response(status=204)

    async def _list_agents(self, request: web.Request) -> web.Response:
        return web.Response(text=self._agents.to_json(time.time_ns()), content_type="application/json")


class _deadline:
    """`asyncio.timeout` of Python 3.11, for 3.10: raises asyncio.TimeoutError when the block takes longer."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._expired = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._expire, task)

    def _expire(self, task: asyncio.Task[object]) -> None:
        self._expired = True
        task.cancel()

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._timer.cancel()
        if self._expired and kind is asyncio.CancelledError:
            raise asyncio.TimeoutError


def _answer(status: int, text: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(status=status, text=text + "\n", headers=headers)


def _busy() -> web.Response:
    return _answer(429, "too many requests at once", {"Retry-After": "1"})
