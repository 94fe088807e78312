"""The reply: fixed HTTP bytes, after a pause that stands in for work."""

import trio

DELAY = 4.0  # seconds of simulated work; long enough to see that clients overlap
BODY = b"Hello World!"

# RFC 9112: a status line, header fields, an empty line, the body; lines end in CR LF.
# `Content-Length` tells the client where the body ends. `Connection: close` tells it that
# this server answers once per connection.
REPLY_HEAD = (
    b"HTTP/1.1 200 OK\r\n"
    b"Content-Type: text/plain; charset=utf-8\r\n"
    b"Content-Length: %d\r\n"
    b"Connection: close\r\n\r\n"
) % len(BODY)
REPLY = REPLY_HEAD + BODY


async def hello_world(request: bytes, *, delay: float = DELAY) -> bytes:
    """Answer any request with ``Hello World!`` after ``delay`` seconds (0 or more).

    A line typed into netcat gets the same HTTP response as an HTTP request. The exception is a
    HEAD request: it gets only the header section (RFC 9110, section 9.3.2).
    """
    await trio.sleep(delay)  # Meanwhile other tasks run; `time.sleep` would stop them all.
    return REPLY_HEAD if request.startswith(b"HEAD ") else REPLY
