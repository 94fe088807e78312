"""Try the two unit files under a real systemd, and print a table of the results.

    python tests/deployment/try_systemd.py [--root FOLDER]

It boots Debian bookworm in a container with its own loopback interface, so nothing changes
outside. The trials take a minute and a half, and installing Debian takes one more.

This needs root, debootstrap, systemd-nspawn (Debian's package systemd-container), iproute2, access
to Debian's packages and PyPI, and a Python with this project's test extra. With --root, the files
of the container stay in that folder, and the next run uses them again.
"""

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from process import hammering, request

HERE = Path(__file__).resolve().parent
SOCKET, ONE, TWO = "trio-server.socket", "trio-server@1.service", "trio-server@2.service"
UNITS = (SOCKET, "trio-server@.service")
PROGRAM = "/opt/trio_server/.venv/bin/trio-server"
PACKAGES = "systemd,systemd-sysv,dbus,python3,python3-venv,iproute2"
ADDRESS = ("127.0.0.1", 1729)
REFUSED = "ConnectionRefusedError(111, 'Connection refused')"

BRISK = 0.05  # seconds of work for a request, so that there are many
LONG = 3.0  # seconds of work, so that many are in flight at once
MOST_TIME = 60.0  # seconds for a command in the container, a boot, a power-off


Row = tuple[Counter[str], str]
"""How the requests of a trial ended, and what else was seen."""


class Machine:
    """A container with systemd as its PID 1."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._pid = ""

    def boot(self) -> None:
        """Start it, and wait until systemd has started everything."""
        options = ("--register=no", "--keep-unit", "-q", "-b", "--console=pipe", "-D")
        self._nspawn = subprocess.Popen(
            ["systemd-nspawn", *options, str(self.root)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children")
        wait_until(lambda: any(map(self._is_init, children.read_text().split())))
        wait_until(lambda: self.ask("is-system-running") in {"running", "degraded"})

    def _is_init(self, pid: str) -> bool:
        with suppress(OSError):  # The process has ended already.
            if Path(f"/proc/{pid}/comm").read_text() == "systemd\n":
                self._pid = pid
        return pid == self._pid

    def power_off(self) -> None:
        """Let systemd stop everything. Kill nspawn, and all that has not ended in time."""
        if self._nspawn is None:
            return
        try:
            if self._pid:
                self.ask("poweroff")
                self._nspawn.wait(MOST_TIME)
        finally:
            self._nspawn.kill()  # The container dies with it (PR_SET_PDEATHSIG).
            self._nspawn.wait()
            self._nspawn, self._pid = None, ""

    def run(self, *command: str, check: bool = False) -> str:
        """Run a command in it; return what it prints."""
        done = subprocess.run(
            ["nsenter", "-t", self._pid, "-a", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=MOST_TIME,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}")
        return done.stdout.strip()

    def do(self, *arguments: str) -> None:
        """Run systemctl; raise an exception if it fails."""
        self.run("systemctl", *arguments, check=True)

    def ask(self, *arguments: str) -> str:
        """Run systemctl; return its output in one line."""
        return " ".join(self.run("systemctl", *arguments).split())

    def pid(self, unit: str) -> str:
        return self.ask("show", "--value", "-p", "MainPID", unit)

    def change(self, unit: str, text: str) -> None:
        """Change a unit with a drop-in file; an empty text undoes that."""
        file = self.root / f"etc/systemd/system/{unit}.d/try-{unit}.conf"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        self.do("daemon-reload")

    def set_delay(self, seconds: float) -> None:
        """Set the seconds of work for a request, in processes that start from now on."""
        command = f"ExecStart=\nExecStart={PROGRAM} --grace-period 30 --delay {seconds:g}\n"
        self.change(UNITS[1], f"[Service]\n{command}")

    def warnings(self) -> list[str]:
        """Return the warnings of the server since the boot, without those of systemd."""
        command = "journalctl -b -q -o cat -t trio-server -p warning"
        return self.run(*command.split()).splitlines()


def wait_until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + MOST_TIME
    while not condition():
        if time.monotonic() > give_up:
            raise TimeoutError(f"waited {MOST_TIME:g} s without success")
        time.sleep(0.05)


def seconds_of(action: Callable[[], object]) -> float:
    begun = time.monotonic()
    action()
    return time.monotonic() - begun


def in_flight(clients: int, action: Callable[[], object]) -> Counter[str]:
    """Do something a second after this many clients have connected; return their results."""
    with ThreadPoolExecutor(clients) as pool:
        replies = [pool.submit(request, ADDRESS) for _ in range(clients)]
        time.sleep(1)
        action()
        return Counter(reply.result() for reply in replies)


def stop_the_socket_first(machine: Machine, then: Callable[[], object]) -> Counter[str]:
    """Stop while 50 requests are in flight. Clients that connect later may be refused."""

    def stop() -> None:
        machine.do("stop", SOCKET)
        then()

    with hammering(ADDRESS, clients=5) as new_clients:
        results = in_flight(50, stop)
    new_clients.pop(REFUSED, None)
    return results + new_clients


def try_activation(machine: Machine) -> Row:
    machine.do("start", SOCKET)
    before = machine.ask("is-active", ONE)
    results: Counter[str] = Counter()
    seconds = seconds_of(lambda: results.update([request(ADDRESS)]))
    return results, f"{before}, {machine.ask('is-active', ONE)} after {seconds:.1f} s"


def try_restarts(machine: Machine, units: list[str], times: int, interval: float) -> Row:
    """Restart the last of these processes while 100 clients send request after request."""
    machine.do("start", *units)
    others = [machine.pid(unit) for unit in units[:-1]]
    taken = []
    with hammering(ADDRESS, clients=100) as results:
        time.sleep(1)
        for _ in range(times):
            taken.append(seconds_of(lambda: machine.do("restart", units[-1])))
            time.sleep(max(0.0, interval - taken[-1]))
        time.sleep(1)
    if others != [machine.pid(unit) for unit in units[:-1]]:
        raise RuntimeError("the other process was restarted, too")
    return results, f"each restart took {max(taken):.1f} s at most"


def try_broken(machine: Machine) -> Row:
    """Let clients wait while the program is missing."""
    machine.do("stop", ONE, TWO)
    program = machine.root / PROGRAM.lstrip("/")
    away = program.rename(program.with_name("away"))

    def repair() -> None:
        time.sleep(8)
        away.rename(program)

    results = in_flight(50, repair)
    failed = machine.ask("show", "--value", "-p", "NRestarts", ONE)
    return results, f"{failed} starts failed; the socket is {machine.ask('is-active', SOCKET)}"


def try_kill(machine: Machine) -> Row:
    machine.do("start", TWO)
    killed = machine.pid(TWO)

    def is_back() -> bool:
        return machine.pid(TWO) != killed and machine.ask("is-active", TWO) == "active"

    with hammering(ADDRESS, clients=20) as results:
        time.sleep(1)
        machine.do("kill", "-s", "KILL", TWO)
        seconds = seconds_of(lambda: wait_until(is_back))
        time.sleep(1)
    return (
        results,
        f"lost: the requests in that process; it runs again after {seconds:.1f} s",
    )


def try_warnings(machine: Machine) -> Row:
    """Count the warnings; then cause one, with fewer files than clients."""
    before = len(machine.warnings())
    machine.change(ONE, "[Service]\nLimitNOFILE=20\n")
    machine.do("stop", TWO)
    machine.do("restart", ONE)
    with hammering(ADDRESS, clients=50) as results:
        time.sleep(2)
    lines = machine.warnings()
    machine.change(ONE, "")
    machine.do("restart", ONE)
    return results, f"{before} lines; with `LimitNOFILE=20` `{lines[-1]}`"


def try_status(machine: Machine) -> Row:
    request(ADDRESS)
    machine.do("kill", "-s", "USR1", ONE)
    time.sleep(0.5)
    lines = machine.run("systemctl", "status", ONE).splitlines()
    [status] = [line.strip() for line in lines if "Status:" in line]
    return Counter(), f"`{status}`"


def try_security(machine: Machine) -> Row:
    """Return the score that systemd gives, and what the kernel enforces."""
    verified = machine.run("systemd-analyze", "verify", SOCKET, ONE, check=True)
    lines = machine.run("systemd-analyze", "security", "--no-pager", ONE).splitlines()
    score = lines[-1].split(": ")[-1].encode("ascii", "ignore").decode().strip()
    pid = machine.pid(ONE)
    status = machine.run("cat", f"/proc/{pid}/status").splitlines()
    names = ("Uid:", "CapBnd:", "Seccomp:", "NoNewPrivs:")
    found = [" ".join(line.split()[:2]) for line in status if line.startswith(names)]
    networks = {machine.run("readlink", f"/proc/{one}/ns/net") for one in ("1", pid)}
    network = "a network of its own" if len(networks) > 1 else "the network of the machine"
    return Counter(), f"{verified or 'nothing'}; {score}; {', '.join(found)}; {network}"


def try_reboot(machine: Machine) -> Row:
    machine.do("enable", SOCKET, ONE, TWO)
    machine.set_delay(LONG)
    machine.do("restart", ONE, TWO)
    results = stop_the_socket_first(machine, machine.power_off)
    machine.boot()
    return results, f"after the boot: {machine.ask('is-active', SOCKET, ONE, TWO)}"


def try_stop(machine: Machine) -> Row:
    results = in_flight(50, lambda: machine.do("stop", ONE, TWO))
    seen = machine.ask("is-active", ONE, TWO)
    results[request(ADDRESS)] += 1
    return results, f"{seen}; the next client started process 1 again"


def try_stop_all(machine: Machine) -> Row:
    machine.do("start", ONE, TWO)
    results = stop_the_socket_first(machine, lambda: machine.do("stop", ONE, TWO))
    return results, f"{machine.ask('is-active', SOCKET, ONE, TWO)}; new clients were refused"


def try_port_80(machine: Machine) -> Row:
    machine.change(SOCKET, "[Socket]\nListenStream=\nListenStream=127.0.0.1:80\n")
    machine.do("start", SOCKET)
    results = Counter([request(("127.0.0.1", 80))])
    user = machine.run("stat", "-c", "%u", f"/proc/{machine.pid(ONE)}")
    return results, f"it answers; the process runs as user {user}"


TRIALS: dict[str, Callable[[Machine], Row]] = {
    "first client, no process runs": try_activation,
    "one process, restarted 4 times under 100 clients": partial(
        try_restarts, units=[ONE], times=4, interval=2
    ),
    "two processes, one restarted 4 times under 100 clients": partial(
        try_restarts, units=[ONE, TWO], times=4, interval=2
    ),
    "two processes, one restarted 10 times in 10 s under 100 clients": partial(
        try_restarts, units=[ONE, TWO], times=10, interval=1
    ),
    "program missing for 9 s, 50 clients wait": try_broken,
    "two processes, `kill -9` of one under 20 clients": try_kill,
    "`journalctl -t trio-server -p warning`": try_warnings,
    "`systemctl kill -s USR1`, then `systemctl status`": try_status,
    "`systemd-analyze verify` and `security`, `/proc/PID/status`": try_security,
    "socket stopped, power off, 50 requests in flight, new clients; boot": try_reboot,
    "`systemctl stop` of both processes, 50 requests in flight": try_stop,
    "socket stopped, then both processes, 50 requests in flight, new clients": try_stop_all,
    "`ListenStream=127.0.0.1:80` in the socket": try_port_80,
}


def print_table(machine: Machine) -> None:
    """Run the trials; print a row after each."""
    delays = f"with --delay {BRISK:g}, and --delay {LONG:g} from the power-off row on"
    print(f"| what was done ({delays})", end=" ")
    print("| requests | lost | what was seen |\n|---|---|---|---|", flush=True)
    for title, trial in TRIALS.items():
        results, seen = trial(machine)
        lost = results.total() - results["answered"]
        numbers = f"{results.total():,} | {lost}" if results else " | "
        print(f"| {title} | {numbers} | {seen} |", flush=True)
        if lost:
            print(f"{title}: {dict(results)}", file=sys.stderr)


def run(*command: str | Path) -> None:
    """Run a command, with its output on stderr: stdout is for the table."""
    subprocess.run(command, check=True, stdout=sys.stderr, timeout=1200)


def install(root: Path) -> None:
    """Install Debian unless it is there; then install the project and its units."""
    if not (root / "usr").exists():
        run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", root)
    folder, wheels = Path(PROGRAM).parents[1], root / "opt/wheels"
    for old in (root / "opt/trio_server", wheels):
        shutil.rmtree(old, ignore_errors=True)
    run(sys.executable, "-m", "pip", "wheel", "-q", "-w", wheels, HERE.parents[1])
    run("chroot", root, "python3", "-m", "venv", folder)
    offline = ("--no-index", "--find-links", "/opt/wheels", "trio-server")
    run("chroot", root, folder / "bin/pip", "install", "-q", *offline)
    system = root / "etc/systemd/system"
    for old in sorted(system.glob("**/*trio-server*"), reverse=True):
        old.rmdir() if old.is_dir() else old.unlink()
    for unit in UNITS:
        shutil.copy(HERE / unit, system)


def try_all(root: Path) -> None:
    run("ip", "link", "set", "lo", "up")
    machine = Machine(root)
    try:
        machine.boot()
        machine.set_delay(BRISK)
        print_table(machine)
    finally:
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, signal.SIG_IGN)
        machine.power_off()


def main() -> None:
    """Install the container; then start this program again in a separate network."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    parser = argparse.ArgumentParser(prog="python tests/deployment/try_systemd.py")
    parser.add_argument("--root", type=Path, metavar="FOLDER", help="keep the container here")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        try_all(options.root)
        return
    with tempfile.TemporaryDirectory() as name:
        root = (options.root or Path(name, "root")).resolve()  # Only root may enter `name`.
        root.mkdir(exist_ok=True)
        install(root)
        enter = ("unshare", "--net", "--mount", sys.executable, __file__)
        with subprocess.Popen([*enter, "--inside", "--root", str(root)]) as inside:
            try:
                status = inside.wait()
            finally:
                inside.terminate()
    sys.exit(status)


if __name__ == "__main__":
    main()
