"""A link in user space: a relay to a server that delays what passes it and lets so many bytes per second through.

    python benchmarks/route/link.py --to 8080 --mb-s 6 --ms 4

Prints the port it listens on. Each direction delays by half of --ms and has --mb-s for itself, over all connections.
This emulates a link's delay and bandwidth, for kernels without tc's netem: it loses no packets, and TCP, which runs on
the machine itself before and behind the relay, has no long path whose window it would have to open.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time

CHUNK_NBYTES = 2**16


class Direction:
    """One way: bytes leave one after the other at the link's rate, and arrive after its delay."""

    def __init__(self, bytes_per_s: float, delay_s: float) -> None:
        self._bytes_per_s, self._delay_s = bytes_per_s, delay_s
        self._free_at = 0.0

    def arrival(self, nbytes: int) -> float:
        """When the last of some bytes arrives that are sent now, on time.monotonic."""
        self._free_at = max(self._free_at, time.monotonic()) + nbytes / self._bytes_per_s
        return self._free_at + self._delay_s


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Direction) -> None:
    """Pass on what comes, in order and in time; at most about a second of it is on its way."""
    on_its_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=1024)

    async def read() -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(CHUNK_NBYTES):
                await on_its_way.put((way.arrival(len(data)), data))
        await on_its_way.put((time.monotonic(), b""))

    reading = asyncio.create_task(read())
    try:
        with contextlib.suppress(ConnectionError):
            while True:
                at, data = await on_its_way.get()
                if (pause := at - time.monotonic()) > 0:
                    await asyncio.sleep(pause)
                if not data:
                    break
                writer.write(data)
                await writer.drain()
    finally:
        reading.cancel()
        writer.close()


async def serve(port: int, bytes_per_s: float, round_trip_s: float) -> None:
    """Relay connections until the process ends."""
    there, back = (Direction(bytes_per_s, round_trip_s / 2) for _ in range(2))

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, far_writer, there), pump(far_reader, writer, back))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    """Relay until it is killed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=int, required=True, help="port of the server on this machine")
    parser.add_argument("--mb-s", type=float, required=True, help="megabytes per second")
    parser.add_argument("--ms", type=float, required=True, help="milliseconds of a round trip")
    options = parser.parse_args()
    asyncio.run(serve(options.to, options.mb_s * 1e6, options.ms / 1e3))


if __name__ == "__main__":
    main()
