"""Clients a long way away, whose packets a test writes itself, to send each one when it likes.

A TUN device hands the packets of a network to a program. Here that network is a namespace with
the server in it, and the program, at its other end, is the test.
"""

import fcntl
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field

TUNSETIFF = 0x400454CA  # <linux/if_tun.h>
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000

FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10  # RFC 9293, section 3.1
TCP = 6  # its protocol number

SERVER_ADDRESSES = ("10.9.0.1", "fd00:9::1")
CLIENT_ADDRESSES = ("10.9.0.2", "fd00:9::2")

# Waits in a namespace of its own for the device to come, then runs the rest of the command line.
ENTER = f"""
while ! ip addr add {SERVER_ADDRESSES[0]}/24 dev "$1" 2>/dev/null; do sleep 0.01; done
ip addr add {SERVER_ADDRESSES[1]}/64 dev "$1" nodad
ip link set "$1" up
shift
exec "$@"
"""


def checksum(data: bytes) -> int:
    """Compute the checksum of RFC 1071."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@dataclass
class Segment:
    """What the server has sent in one packet."""

    port: int  # of the client
    sequence: int
    flags: int
    payload: bytes


class Network:
    """The other end of the namespace's device."""

    def __init__(self) -> None:
        self.device: str = f"far-{os.getpid()}"
        self._tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(
            self._tun, TUNSETIFF, struct.pack("16sH22x", self.device.encode(), IFF_TUN | IFF_NO_PI)
        )
        self.clients: dict[int, Client] = {}

    def close(self) -> None:
        """Take the device away."""
        os.close(self._tun)

    def carry(self, until: Callable[[], bool], seconds: float = 10) -> bool:
        """Hand the server's packets to the clients, until a condition holds or time is over."""
        give_up = time.monotonic() + seconds
        while not until() and time.monotonic() < give_up:
            if select.select([self._tun], [], [], 0.02)[0]:
                segment = parse(os.read(self._tun, 65536))
                if segment and segment.port in self.clients:
                    self.clients[segment.port].receive(segment)
        return until()

    def write(self, packet: bytes) -> None:
        """Send a packet to the server."""
        os.write(self._tun, packet)


def parse(packet: bytes) -> Segment | None:
    """Take a packet apart; return nothing if it is not TCP."""
    if packet[0] >> 4 == 4:
        protocol, start = packet[9], (packet[0] & 0x0F) * 4
    else:
        protocol, start = packet[6], 40
    if protocol != TCP:
        return None
    segment = packet[start:]
    _, port, sequence, _, offset, flags = struct.unpack_from("!HHLLBB", segment)
    return Segment(port, sequence, flags, segment[(offset >> 4) * 4 :])


@dataclass
class Client:
    """A client with a TCP of its own: so simple that it needs a network without loss."""

    network: Network
    server: tuple[str, int]
    port: int
    ttl: int = 64
    shaken: bool = False  # The server has answered the first packet of the handshake.
    reset: bool = False
    ended: bool = False
    received: bytes = b""
    _sequence: int = 1000
    _expected: int = field(default=0)  # the next sequence number of the server

    def __post_init__(self) -> None:
        self.network.clients[self.port] = self

    def connect(self) -> None:
        """Begin the handshake, and leave its last packet to `request`."""
        self._send(SYN)
        self._sequence += 1

    def request(self, request: bytes) -> None:
        """End the handshake, and send a request in the next packet."""
        self._send(ACK)
        self._send(PSH | ACK, request)
        self._sequence += len(request)

    def receive(self, segment: Segment) -> None:
        """Take what the server has sent, and acknowledge it."""
        if segment.flags & RST:
            self.reset = True
        elif segment.flags & SYN:
            self.shaken = True
            self._expected = segment.sequence + 1
        elif segment.sequence == self._expected and (segment.payload or segment.flags & FIN):
            self.received += segment.payload
            self._expected += len(segment.payload)
            if segment.flags & FIN:
                self.ended = True
                self._expected += 1
            self._send(ACK | (segment.flags & FIN))

    def _send(self, flags: int, payload: bytes = b"") -> None:
        ours, theirs = (
            socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
            for address in (CLIENT_ADDRESSES[":" in self.server[0]], self.server[0])
        )
        expected = self._expected if flags & ACK else 0
        fields = (self.port, self.server[1], self._sequence, expected, 5 << 4, flags, 65535)
        length = 20 + len(payload)
        # The checksum covers the addresses, the protocol and the length, too.
        covered = ours + theirs + struct.pack("!HH", TCP, length)
        total = checksum(covered + struct.pack("!HHLLBBHHH", *fields, 0, 0) + payload)
        segment = struct.pack("!HHLLBBHHH", *fields, total, 0) + payload
        if len(ours) == 16:
            header = struct.pack("!LHBB", 6 << 28, length, TCP, self.ttl) + ours + theirs
        else:
            start = struct.pack("!BBHHHBB", 0x45, 0, 20 + length, 0, 0, self.ttl, TCP)
            addresses = ours + theirs
            total = checksum(start + b"\0\0" + addresses)
            header = start + struct.pack("!H", total) + addresses
        self.network.write(header + segment)
