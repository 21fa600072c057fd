"""Two hosts with a cable between them: network namespaces, which need no rights beyond those of a user namespace."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

_ENTER = ("nsenter", "--preserve-credentials", "-U", "-n", "-m", "-t")


class Cable:
    """Hosts 0 and 1. Raises `subprocess.CalledProcessError` where the kernel gives no namespaces."""

    hosts = ("10.77.0.1", "10.77.0.2")

    def __init__(self) -> None:
        self._keepers: list[subprocess.Popen[bytes]] = []
        try:
            self._keep("unshare", "-rnm")
            self._keep(*self.inside(0), "unshare", "-nm")
            for host in (0, 1):
                self._ip(host, "link", "set", "lo", "up")
            self.lay("cable", self.hosts)
        except BaseException:
            self.close()
            raise

    def lay(self, name: str, addresses: Sequence[str]) -> None:
        """One more cable between the two, which `cut` leaves alone."""
        self._ip(0, "link", "add", name, "type", "veth", "peer", "name", name, "netns", str(self.far))
        for host, address in enumerate(addresses):
            self._ip(host, "addr", "add", f"{address}/24", "dev", name)
            self._ip(host, "link", "set", name, "up")

    @property
    def far(self) -> int:
        """A process on host 1."""
        return self._keepers[1].pid

    def inside(self, host: int) -> Sequence[str]:
        """What makes a command run on that host."""
        return (*_ENTER, str(self._keepers[host].pid))

    def cut(self) -> None:
        self._ip(1, "link", "set", "cable", "down")

    def join(self) -> None:
        self._ip(1, "link", "set", "cable", "up")

    def close(self) -> None:
        """Idempotent. Processes that still run inside keep their namespace."""
        for keeper in self._keepers:
            assert keeper.stdin is not None
            assert keeper.stdout is not None
            keeper.kill()
            keeper.wait()
            keeper.stdin.close()
            keeper.stdout.close()
        self._keepers.clear()

    def _keep(self, *enter: str) -> None:
        """A process that keeps a namespace, and has said that it is there. UCX finds network cards in /sys."""
        command = [*enter, "sh", "-c", "mount -t sysfs none /sys && echo here && exec cat"]
        keeper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._keepers.append(keeper)
        assert keeper.stdout is not None
        if keeper.stdout.readline() != b"here\n":
            raise subprocess.CalledProcessError(keeper.wait(), command)

    def _ip(self, host: int, *what: str) -> None:
        subprocess.run([*self.inside(host), "ip", *what], check=True, capture_output=True)
