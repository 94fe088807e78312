import sys
from functools import partial

import trio

PORT, DELAY = int(sys.argv[1]), float(sys.argv[2])
REPLY = (
    b"HTTP/1.1 200 OK\r\n"
    b"Content-Type: text/plain; charset=utf-8\r\n"
    b"Content-Length: 12\r\nConnection: close\r\n\r\n"
    b"Hello World!"
)


async def handler(stream: trio.SocketStream) -> None:
    await stream.receive_some(1024)
    await trio.sleep(DELAY)
    await stream.send_all(REPLY)


trio.run(partial(trio.serve_tcp, handler, PORT, host="localhost"))
