"""The measurements: load from ab, memory and processor time from /proc."""

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from servers import HOST, Running

from trio_server.responder import BODY

CLIENTS = 64
"""Connections at once when the rate is measured: enough to keep a server busy all the time."""

AB_TIMEOUT = 90.0
"""Seconds until ab is killed and its requests count as failed. A server that answers 1,000
requests per second needs a quarter of this time."""

SAMPLES = 20
"""How often per delay the open files of a server are counted. Counting 10,000 of them costs
milliseconds of a core, so they are not counted more often."""

PAGE = os.sysconf("SC_PAGE_SIZE")  # bytes
TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds

CROWD_LOADS = 4
"""How many ab make the connections of a crowd."""


@dataclass(frozen=True)
class Load:
    """What ab reports about its requests. If some failed, there are no times and no rate.

    Attributes:
        requests: The number of requests.
        failures: How many of them did not receive a 200 with the right body.
        rate: Requests per second.
        p50: Seconds from connecting to the end of the reply, for the median request.
        p99: The same time, which 99 % of the requests do not exceed.
        longest: The same time for the slowest request.
    """

    requests: int
    failures: int
    rate: float | None = None
    p50: float | None = None
    p99: float | None = None
    longest: float | None = None


@dataclass(frozen=True)
class AtOnce:
    """Many connections at once.

    Attributes:
        load: What their clients saw.
        memory: Bytes of the server's memory per connection; None if they were never all open.
        dropped: How often the kernel found the accept queue full and ignored a client. The
            client tries again a second later, which explains large times.
    """

    load: Load
    memory: float | None
    dropped: int


@dataclass(frozen=True)
class Rate:
    """As many connections per second as the server can answer.

    Attributes:
        load: What their clients saw.
        cpu: Seconds of the server's processor time per connection, in user and system mode.
    """

    load: Load
    cpu: float | None


@dataclass(frozen=True)
class Crowd:
    """More connections at once than one process may open.

    Attributes:
        failures: How many requests failed.
        p99: The largest `Load.p99` of all ab; None if some requests failed.
        memory: The most bytes that all processes used together.
        cpu: Seconds of processor time per connection.
    """

    failures: int
    p99: float | None
    memory: int
    cpu: float


def connect_at_once(server: Running, connections: int, delay: float) -> AtOnce:
    """Make connections all at once to a fresh server that works for ``delay`` seconds on each."""
    # One more: ab makes its first request alone, and the others after the first reply.
    requests = connections + 1
    pid = server.process.pid
    resident_before, files_before = resident(pid), descriptors(pid)
    samples = []
    dropped_before = dropped()
    with ab(server.port, requests, connections) as client:
        deadline = time.monotonic() + AB_TIMEOUT
        while client.poll() is None and time.monotonic() < deadline:
            # With one open file per connection, all were accepted and none was closed.
            if descriptors(pid) >= files_before + connections:
                samples.append((resident(pid) - resident_before) / connections)
            time.sleep(delay / SAMPLES)
        load = report(client, requests, deadline)
    # At the median sample all handlers have started, and none has answered.
    memory = None if load.failures or not samples else statistics.median(samples)
    return AtOnce(load, memory, dropped() - dropped_before)


def measure_rate(server: Running, requests: int) -> Rate:
    """Make requests to a server without a delay; measure their rate and processor time."""
    before = cpu_time(server.process.pid)
    load = make_requests(server.port, requests)
    cpu = (cpu_time(server.process.pid) - before) / requests
    return Rate(load, None if load.failures else cpu)


def make_requests(port: int, requests: int, clients: int = CLIENTS) -> Load:
    """Make requests as fast as the server answers them."""
    with ab(port, requests, clients) as client:
        return report(client, requests, time.monotonic() + AB_TIMEOUT)


def connect_crowd(servers: Sequence[Running], connections: int, delay: float) -> Crowd:
    """Make connections all at once to processes that share a port.

    Several ab make them, as one ab cannot make more than 20,000. Each has an address of its own,
    as an address has only 28,000 ports.
    """
    pids = [server.process.pid for server in servers]
    each = connections // CROWD_LOADS
    cpu_before = sum(map(cpu_time, pids))
    resident_most = 0
    with ExitStack() as stack:
        clients = [
            stack.enter_context(ab(servers[0].port, each + 1, each, f"127.0.0.{2 + number}"))
            for number in range(CROWD_LOADS)
        ]
        deadline = time.monotonic() + AB_TIMEOUT
        while any(client.poll() is None for client in clients) and time.monotonic() < deadline:
            resident_most = max(resident_most, sum(map(resident, pids)))
            time.sleep(delay / SAMPLES)
        loads = [report(client, each + 1, deadline) for client in clients]
    cpu = sum(map(cpu_time, pids)) - cpu_before
    p99s = [load.p99 for load in loads if load.p99 is not None]
    return Crowd(
        sum(load.failures for load in loads),
        max(p99s) if len(p99s) == len(loads) else None,
        resident_most,
        cpu / connections,
    )


@contextmanager
def ab(
    port: int, requests: int, clients: int, address: str = HOST
) -> Iterator[subprocess.Popen[str]]:
    """Run ab until the block ends."""
    # -r: continue after an error, to count the errors. -q: no progress. -B: the own address.
    numbers = ("-n", str(requests), "-c", str(clients))
    command = ("ab", "-r", "-q", "-B", address, *numbers, f"http://{HOST}:{port}/")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def report(client: subprocess.Popen[str], requests: int, deadline: float) -> Load:
    """Wait for ab until the time ``deadline`` of `time.monotonic`, and read its report."""
    try:
        text, _ = client.communicate(timeout=max(0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return Load(requests, failures=requests)
    load = parse(text, requests)
    if load.failures:
        print(text, file=sys.stderr)
    return load


def parse(text: str, requests: int) -> Load:
    """Read the report of ab about a number of requests."""

    def number(pattern: str) -> float | None:
        found = re.search(pattern, text, re.MULTILINE)
        return float(found[1]) if found else None

    def seconds(percentage: int) -> float | None:
        milliseconds = number(rf"^ +{percentage}% +(\d+)")
        return None if milliseconds is None else milliseconds / 1000

    transferred = number(r"^HTML transferred: +(\d+)")
    if transferred is None:  # ab gave up, after a while without a reply, for example.
        completed = number(r"^Total of (\d+) requests completed") or 0
        return Load(requests, requests - int(completed))
    # ab compares each body with the first one.
    if number(r"^Document Length: +(\d+)") != len(BODY):
        return Load(requests, requests)
    # A bad reply may count as more than one failure; one without a body may count as none.
    complaints = (number(r"^Failed requests: +(\d+)"), number(r"^Non-2xx responses: +(\d+)"))
    complained = sum(int(complaint or 0) for complaint in complaints)
    unanswered = requests - int(transferred) // len(BODY)
    if failures := min(requests, max(complained, unanswered)):
        return Load(requests, failures)
    rate = number(r"^Requests per second: +([\d.]+)")
    return Load(requests, 0, rate, seconds(50), seconds(99), seconds(100))


def dropped() -> int:
    """Count how often an accept queue was full since the kernel started."""
    lines = (line.split() for line in Path("/proc/net/netstat").read_text().splitlines())
    for names, numbers in zip(lines, lines, strict=True):  # a line of names, one of numbers
        if "ListenOverflows" in names:
            return int(numbers[names.index("ListenOverflows")])
    return 0


def resident(pid: int) -> int:
    """Measure the memory of a process and its descendants, in bytes."""
    return PAGE * sum(int(text.split()[1]) for text in proc_files(pid, "statm"))


def cpu_time(pid: int) -> float:
    """Measure the processor time that a process and its descendants have used, in seconds."""
    # The name, in parentheses, may hold spaces; user and system time are the fields 14 and 15.
    after_names = (text.rpartition(")")[2].split() for text in proc_files(pid, "stat"))
    return TICK * sum(int(fields[11]) + int(fields[12]) for fields in after_names)


def descriptors(pid: int) -> int:
    """Count the open files of a process and its descendants."""
    number = 0
    for member in family(pid):
        with suppress(OSError):  # It has ended.
            number += len(os.listdir(f"/proc/{member}/fd"))  # noqa: PTH208 - paths take longer
    return number


def proc_files(pid: int, name: str) -> Iterator[str]:
    """Read a file of /proc about a process and each of its descendants."""
    for member in family(pid):
        with suppress(OSError):  # It has ended.
            yield Path(f"/proc/{member}/{name}").read_text()


def family(pid: int) -> Iterator[int]:
    """Find a process and its descendants: some servers work in a child process."""
    yield pid
    with suppress(OSError):  # It has ended.
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from family(int(child))
