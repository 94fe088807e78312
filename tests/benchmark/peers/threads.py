"""The same with a thread for each connection, by the standard library."""

import os
import time
from socketserver import BaseRequestHandler, ThreadingTCPServer

DELAY = float(os.environ["DELAY"])  # seconds
REPLY = os.environb[b"REPLY"]


class Answer(BaseRequestHandler):
    def handle(self) -> None:
        self.request.recv(1024)
        time.sleep(DELAY)
        self.request.sendall(REPLY)


class Server(ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True  # without it, each new thread goes through a list of all that run
    request_queue_size = 65_535  # as Trio has it; the 5 of the library would measure drops


with Server(("127.0.0.1", int(os.environ["PORT"])), Answer) as server:
    server.serve_forever()
