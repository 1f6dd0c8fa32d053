"""Settings of a server: where it listens, who may ask, and the limits that hold for everyone."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from edgekv.errors import InputError

MAX_PARALLEL = 64


@dataclass(frozen=True)
class ServerSettings:
    """A server's own settings; those of the engine are in edgekv.serve.engine_process.Options.

    Attributes:
        host: the address to listen on; others than this machine's own need an api_key.
        port: 0 takes one that is free.
        api_key: what clients send as `Authorization: Bearer KEY`; "" for none.
        parallel: requests that are answered side by side.
        queue: requests that wait for one of those to end; more get 429.
        max_body: bytes of a request.
        timeout_s: seconds that a request may take, its wait in the queue included.
        peers: addresses of servers of the same model, which may answer requests or give rows.
        peer_key: what servers send each other; needed unless all of them are on this machine.

    Raises:
        InputError: a value is out of its range, or the address is open to others without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str = ""
    parallel: int = 4
    queue: int = 32
    max_body: int = 4 * 2**20
    timeout_s: float = 600.0
    peers: tuple[str, ...] = ()
    peer_key: str = ""

    def __post_init__(self) -> None:
        allowed = {
            "port": (0 <= self.port <= 65535, "between 0 and 65535"),
            "parallel": (1 <= self.parallel <= MAX_PARALLEL, f"between 1 and {MAX_PARALLEL}"),
            "queue": (self.queue >= 0, "0 or more"),
            "max_body": (self.max_body >= 1, "at least 1"),
            "timeout_s": (self.timeout_s > 0, "above 0"),
        }
        for name, (holds, words) in allowed.items():
            if not holds:
                raise InputError(f"{name} is {getattr(self, name)}; it must be {words}")
        for name, key in (("API key", self.api_key), ("peers' key", self.peer_key)):
            if not (key.isascii() and key.isprintable() and " " not in key):
                raise InputError(
                    f"the {name} holds blanks or letters beyond ASCII; take another, without them"
                )
        if not self.api_key and not self.is_loopback:
            raise InputError(
                f"{self.host} can be reached from other machines; give a key with --api-key or EDGEKV_API_KEY, "
                "or listen on 127.0.0.1"
            )
        self._check_peers()

    def _check_peers(self) -> None:
        hosts = [_peer_host(url) for url in self.peers]
        if self.peers and not self.peer_key:
            for host in (self.host, *hosts):
                if not is_loopback(host):
                    raise InputError(
                        f"{host} can be reached from other machines; give all servers one key with --peer-key or "
                        "EDGEKV_PEER_KEY"
                    )

    @property
    def is_loopback(self) -> bool:
        """Whether only programs on this machine can reach the server."""
        return is_loopback(self.host)

    @property
    def shares(self) -> bool:
        """Whether other servers may ask for rows and answers."""
        return bool(self.peers or self.peer_key)


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, for programs on it alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _peer_host(url: str) -> str:
    """The host of a peer's address; raises InputError unless it is one such as http://pi-2:8080."""
    try:
        parts = urlsplit(url)
        plain = parts.scheme in ("http", "https") and not (
            parts.path.strip("/") or parts.query or parts.fragment
        )
        if plain and parts.hostname and not parts.username and parts.port != 0:
            return parts.hostname
    except ValueError:
        pass
    raise InputError(f"{url!r} is no address of a server; name it as http://pi-2:8080")
