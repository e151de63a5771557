"""Two network namespaces with a cable between them, as two hosts that share a file system."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

IFNAME = "cable0"


@dataclass(frozen=True)
class TwoHosts:
    """Names of both namespaces, and the address of each."""

    names: tuple[str, str]
    addresses: tuple[str, str]

    def command(self, host: int, *words: object) -> list[str]:
        """A command, to be run on one of them."""
        return ["ip", "netns", "exec", self.names[host], *map(str, words)]

    def cut_off(self, host: int) -> None:
        """Take the cable out: nothing is refused, nothing arrives."""
        _ip("-n", self.names[host], "link", "set", IFNAME, "down")

    def back(self, host: int) -> None:
        """Put it in again."""
        _ip("-n", self.names[host], "link", "set", IFNAME, "up")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def may_make_hosts() -> bool:
    """Whether this user may."""
    name = f"try-{os.getpid()}"
    try:
        _ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        return False
    _ip("netns", "del", name)
    return True


@contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Both, connected; gone behind the block."""
    names = (f"host-a-{os.getpid()}", f"host-b-{os.getpid()}")
    hosts = TwoHosts(names, ("10.77.0.1", "10.77.0.2"))
    try:
        for name in names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", names[0], "link", "add", IFNAME, "type", "veth", "peer", "name", IFNAME, "netns", names[1])
        for name, address in zip(names, hosts.addresses, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", IFNAME)
            _ip("-n", name, "link", "set", IFNAME, "up")
        yield hosts
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
