"""Tuner's one endpoint on this machine, with the faults that can be applied to it."""

import asyncio
from types import TracebackType
from typing import Any, Self

from aiohttp import web


class TunerReceiver:
    """Takes `POST /api/v1/public/call`.

    Attributes:
        calls: The payloads taken.
        status: The answer to the next `times` requests (None: to all), if it is not 200.
        hang: Never answer.
    """

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.status = 200
        self.times: int | None = None
        self.hang = False
        self.port = 0
        self._stopping = asyncio.Event()
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """Tuner's base address."""
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_post("/api/v1/public/call", self._take)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Be down from now on."""
        self._stopping.set()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _take(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.hang:
            await self._stopping.wait()
        if self.status != 200 and self.times != 0:
            if self.times is not None:
                self.times -= 1
            return web.json_response({"error": "rehearsed"}, status=self.status)
        self.calls.append(body)
        return web.json_response({"ok": True})
