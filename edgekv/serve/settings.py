"""Settings of a server: where it listens, who may ask, and the limits that hold for everyone."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

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
        if not (self.api_key.isascii() and self.api_key.isprintable() and " " not in self.api_key):
            raise InputError("the API key holds blanks or letters beyond ASCII; take another, without them")
        if not self.api_key and not self.is_loopback:
            raise InputError(
                f"{self.host} can be reached from other machines; give a key with --api-key or EDGEKV_API_KEY, "
                "or listen on 127.0.0.1"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only programs on this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
