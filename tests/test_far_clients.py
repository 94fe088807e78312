"""Clients whose handshake is under way when the server is told to stop.

A handshake takes one round trip, and this kernel may have no way to make that long. So these
clients hold the last packet of it back.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import far
import pytest
from process import Process, Start, tool

from trio_server.responder import REPLY

REQUEST = b"GET / HTTP/1.1\r\n\r\n"


@pytest.fixture
def network() -> Iterator[far.Network]:
    if os.geteuid() != 0 or not Path("/dev/net/tun").exists():
        pytest.skip("only root can make a network, and only with /dev/net/tun")
    network = far.Network()
    yield network
    network.close()


@pytest.fixture(params=far.SERVER_ADDRESSES)
def server(request: pytest.FixtureRequest, start: Start, network: far.Network) -> Process:
    """The command in a network of its own, on its IPv4 or its IPv6 address."""
    prefix = (tool("unshare"), "--net", "sh", "-c", far.ENTER, "sh", network.device)
    process = start("--host", request.param, "--port", "0", "--delay", "0", prefix=prefix)
    outside = Path("/proc/self/ns/net").readlink()
    inside = Path(f"/proc/{process.popen.pid}/ns/net")
    process.wait_until(lambda: inside.readlink() != outside)
    move = (tool("ip"), "link", "set", network.device, "netns", str(process.popen.pid))
    subprocess.run(move, check=True, timeout=10)
    process.wait_for_banner()
    return process


@pytest.fixture
def new_client(network: far.Network, server: Process) -> Callable[..., far.Client]:
    """Make a client, and begin its handshake."""
    ports = iter(range(40_000, 50_000))

    def connect(ttl: int = 64) -> far.Client:
        client = far.Client(network, server.addresses[0], next(ports), ttl)
        client.connect()
        return client

    return connect


def test_handshakes_under_way_at_a_shutdown_are_answered_and_newcomers_ignored(
    network: far.Network, server: Process, new_client: Callable[..., far.Client]
) -> None:
    clients = [new_client(ttl) for _ in range(25) for ttl in (64, 255)]
    assert network.carry(lambda: all(client.shaken for client in clients))

    server.kill(signal.SIGTERM)
    told = time.monotonic()
    server.wait_for_log("shutting down")
    time.sleep(0.2)
    newcomers = [new_client(ttl) for ttl in (64, 255)]
    assert not network.carry(lambda: any(client.shaken for client in newcomers), seconds=0.3)
    # As many seconds later as with a round trip of 0.7 s.
    time.sleep(max(0, told + 0.7 - time.monotonic()))
    for client in clients:
        client.request(REQUEST)
    assert network.carry(lambda: all(client.ended or client.reset for client in clients))
    assert [client.received for client in clients] == [REPLY] * 50
    assert not any(client.reset for client in clients)
    assert server.wait() == 0
    assert "50 answered, 0 sent nothing" in server.stderr
    assert not any(client.shaken for client in newcomers)


@pytest.mark.parametrize("server", far.SERVER_ADDRESSES[:1], indirect=True)
def test_a_handshake_that_never_ends_does_not_hold_a_shutdown_up(
    network: far.Network, server: Process, new_client: Callable[..., far.Client]
) -> None:
    client = new_client()
    assert network.carry(lambda: client.shaken)
    assert server.stop() == 0
