"""Links to a network namespace: what is sent over one that is cut is lost, as between machines."""

import asyncio
import os
import subprocess
from typing import Final, final

from flowcontrol_server.common.addresses import Address

TOOL: Final = "/usr/sbin/ip"
_NETWORK: Final = "10.213"
_numbers = iter(range(1, 255))


@final
class Namespace:
    """A network of its own, in which a server can be started; needs root."""

    def __init__(self) -> None:
        self.name = f"flowcontrol-{os.getpid()}-{next(_numbers)}"
        ip("netns", "add", self.name)
        self.command = (TOOL, "netns", "exec", self.name)
        """Begins the command of a process that is to run in it."""

    def remove(self) -> None:
        """Remove it, and all links to it."""
        ip("netns", "delete", self.name)


@final
class Link:
    """A cable between this network and a namespace, with an address at either end.

    Args:
        namespace: at its other end.
        port: of a server there, which listens on every address.
    """

    def __init__(self, namespace: Namespace, port: int) -> None:
        number = next(_numbers)
        near, self._far = (f"fc{os.getpid() % 100_000}{end}{number}" for end in "nf")
        self._namespace = namespace.name
        self.address = Address(f"{_NETWORK}.{number}.2", port)
        ip("link", "add", near, "type", "veth", "peer", "name", self._far, "netns", namespace.name)
        ip("address", "add", f"{_NETWORK}.{number}.1/30", "dev", near)
        ip("link", "set", near, "up")
        self._ip("address", "add", f"{self.address.host}/30", "dev", self._far)
        self.mend()

    async def open(self) -> None:
        """Be open from the beginning."""

    async def close(self) -> None:
        """Go with the namespace."""
        await asyncio.sleep(0)

    def cut(self) -> None:
        """Lose what is sent, either way; no end is told."""
        self._ip("link", "set", self._far, "down")

    def mend(self) -> None:
        """Let pass what is sent from now on."""
        self._ip("link", "set", self._far, "up")

    def _ip(self, *words: str) -> None:
        ip("-netns", self._namespace, *words)


def ip(*words: str) -> None:
    """Change networks."""
    subprocess.run((TOOL, *words), check=True)
