"""Restart three servers behind load balancers, one after the other, while clients send requests.

HAProxy and nginx use the files of this folder unchanged. They run in a separate network namespace,
where the ports are free. This needs root, and the programs unshare, ip, haproxy and nginx.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parent))
from process import Process, hammering, request, tool  # noqa: E402 - it is in that folder

SERVERS = ("127.0.0.2", "127.0.0.3", "127.0.0.4")  # as in the files
BALANCERS = {"HAProxy": 8080, "nginx, TCP": 8081, "nginx, HTTP": 8082}  # their ports

CLIENTS = 20  # for each balancer
PAUSE = 0.2  # seconds that a server is down, and then up before the next one is stopped
LONG = 0.25  # seconds; a client that waits longer waits for a restart, not for a busy machine


def main() -> int:
    """Restart the servers, print what the clients saw, and return 1 if a request was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1, help="how often to restart each server")
    parser.add_argument("--delay", type=float, default=0.2, help="seconds of work for a request")
    options = parser.parse_args()
    if os.environ.get("NAMESPACE") != "ours":
        enter_namespace()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers = [Server(Path(folder), host, options.delay) for host in SERVERS]
        for server in servers:
            stack.callback(server.end)
            server.wait_until_it_accepts()
        stack.enter_context(balancing(Path(folder)))
        with ExitStack() as load:
            clients = {name: Clients(load, port) for name, port in BALANCERS.items()}
            for server in servers * options.rounds:
                time.sleep(PAUSE)
                server.stop()
                time.sleep(PAUSE)
                server.start()
                server.wait_until_it_accepts()
            time.sleep(PAUSE)
    print(f"Restarts under load: {len(servers) * options.rounds}")
    return max([one.report(name, options.delay) for name, one in clients.items()])


def enter_namespace() -> None:
    """Start this program again, in a network that has only a loopback interface."""
    enter = [tool("unshare"), "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    environment = {**os.environ, "NAMESPACE": "ours", "PATH": path}
    os.execve(enter[0], [*enter, sys.executable, *sys.argv], environment)  # noqa: S606 - in its place


class Server:
    """One of the servers: the command on its own address."""

    def __init__(self, folder: Path, host: str, delay: float) -> None:
        self._folder = folder
        self._options = ("--host", host, "--delay", str(delay))
        self.start()

    def start(self) -> None:
        """Start it."""
        self._process = Process(self._folder, self._options)

    def wait_until_it_accepts(self) -> None:
        """Wait until it accepts connections."""
        self._process.wait_for_banner()

    def stop(self) -> None:
        """Stop it with a plain SIGTERM."""
        if status := self._process.stop():
            raise RuntimeError(f"exit status {status}: {self._process.stderr}")

    def end(self) -> None:
        """Kill it, if it still runs."""
        self._process.popen.kill()
        self._process.wait()


class Clients:
    """The clients of one balancer."""

    def __init__(self, load: ExitStack, port: int) -> None:
        self._took: list[float] = []  # seconds for each request
        self._results = load.enter_context(hammering(("127.0.0.1", port), CLIENTS, self._ask))

    def _ask(self, address: tuple[str, int]) -> str:
        begun = time.monotonic()
        outcome = ask(address)
        self._took.append(time.monotonic() - begun)
        return outcome

    def report(self, name: str, delay: float) -> int:
        """Print what the clients saw; return 1 if a request was lost."""
        waits = [seconds - delay for seconds in self._took]
        lost = len(waits) - self._results.pop("answered", 0)
        print(
            f"{name}: {len(waits)} requests, {lost} lost, {sum(wait > LONG for wait in waits)} "
            f"waited longer than {LONG} s, the longest {max(waits):.2f} s"
        )
        for outcome, times in self._results.items():
            print(f"    {times} times {outcome}")
        return 1 if lost else 0


@contextmanager
def balancing(folder: Path) -> Iterator[None]:
    """Run the balancers with their files, and wait until they answer."""
    haproxy = [tool("haproxy"), "-db", "-f", str(FOLDER / "haproxy.cfg")]
    settings = f"daemon off; pid {folder}/nginx.pid;"
    nginx = [tool("nginx"), "-e", "stderr", "-g", settings, "-c", str(FOLDER / "nginx.conf")]
    with (folder / "balancers.log").open("wb") as log, ExitStack() as stack:
        for command in (haproxy, nginx):
            process = stack.enter_context(subprocess.Popen(command, stdout=log, stderr=log))
            stack.callback(process.terminate)
        give_up = time.monotonic() + 10
        while not all(ask(("127.0.0.1", port)) == "answered" for port in BALANCERS.values()):
            if time.monotonic() > give_up:
                raise RuntimeError((folder / "balancers.log").read_text())
            time.sleep(0.1)
        yield


def ask(address: tuple[str, int]) -> str:
    """Send a request; return "answered" or what went wrong. A proxy may add header fields."""
    return request(address, b"GET / HTTP/1.0\r\n\r\n", is_answer=is_answer)


def is_answer(reply: bytes) -> bool:
    """Return whether a reply is complete."""
    return reply.startswith(b"HTTP/1.1 200 ") and reply.endswith(b"\r\n\r\nHello World!")


if __name__ == "__main__":
    sys.exit(main())
