"""The same body from an ASGI application: one for a Trio loop, one for an asyncio loop."""

import asyncio
import os
from typing import Any

import trio

DELAY = float(os.environ["DELAY"])  # seconds
BODY = os.environb[b"REPLY"].partition(b"\r\n\r\n")[2]
HEADERS = [
    (b"content-type", b"text/plain; charset=utf-8"),
    (b"content-length", b"%d" % len(BODY)),
]


async def on_trio(scope: Any, _receive: Any, send: Any) -> None:
    only_http(scope)
    await trio.sleep(DELAY)
    await reply(send)


async def on_asyncio(scope: Any, _receive: Any, send: Any) -> None:
    only_http(scope)
    await asyncio.sleep(DELAY)
    await reply(send)


def only_http(scope: Any) -> None:
    """Refuse the events of starting and stopping, as the specification allows."""
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])


async def reply(send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": BODY})
