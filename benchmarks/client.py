"""What `ringlm bench --url` costs itself: its load against a server that computes nothing.

    python benchmarks/client.py [--concurrency 1,16,64] [-n 128] [--gap 0.02] [-r 3] [--json]

Each answer's parts come every `gap` seconds. Shown are the times between them as the client sees them, which should be
the gap, and the processor time that the client takes for a part, all of HTTP included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from rich.console import Console
from rich.table import Table

from ringlm.frontend.load import LoadOptions, measure


class Nothing:
    """Speaks as much of OpenAI's API as the benchmark asks for."""

    def __init__(self, gap_s: float) -> None:
        self._gap_s = gap_s

    async def serve(self, port: Connection) -> None:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = next((line for line in head.split("\r\n") if line.startswith("content-length:")), ":0")
                body = json.loads(await reader.readexactly(int(length.split(":")[1])) or b"{}")
                if body.get("stream"):
                    await self._stream(writer, body)
                else:
                    words = len(body.get("prompt", "").split())
                    value = {"data": [{"id": "nothing"}], "usage": {"prompt_tokens": words, "completion_tokens": 1}}
                    data = json.dumps(value).encode()
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(data), data))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def _stream(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for event in self._events(body["max_tokens"]):
            await asyncio.sleep(self._gap_s)
            data = f"data: {event}\n\n".encode()
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        writer.write(b"0\r\n\r\n")

    def _events(self, tokens: int) -> Iterator[str]:
        about = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": "nothing"}
        for left in reversed(range(tokens)):
            choice = {"index": 0, "text": " word", "logprobs": None, "finish_reason": None if left else "length"}
            yield json.dumps(about | {"choices": [choice]})
        yield "[DONE]"


def _serve(gap_s: float, port: Connection) -> None:
    asyncio.run(Nothing(gap_s).serve(port))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", default="1,16,64")
    parser.add_argument("-n", type=int, default=128, help="parts of an answer")
    parser.add_argument("--gap", type=float, default=0.02, help="seconds between parts")
    parser.add_argument("-r", type=int, default=3, help="rounds after a warm-up")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    server = spawn.Process(target=_serve, args=(options.gap, theirs), daemon=True)
    server.start()
    rows = []
    try:
        url = f"http://127.0.0.1:{ours.recv()}/v1"
        for size in map(int, options.concurrency.split(",")):
            result = measure(LoadOptions(url, None, None, 16, options.n, [size], options.r))
            row = result["rows"][0]
            row["us_a_part"] = result["client_share"] / row["tokens_per_s"] * 1e6
            rows.append(row)
    finally:
        server.terminate()
    if options.json:
        print(json.dumps(rows))
        return
    table = Table(title=f"{options.n} parts, {options.gap * 1e3:.1f} ms apart")
    for heading in ("streams", "parts/s", "us a part", "ms between, p50", "p90", "p99"):
        table.add_column(heading, justify="right")
    for row in rows:
        between = [f"{row[f'inter_token_ms_p{share}']:.2f}" for share in (50, 90, 99)]
        table.add_row(str(row["concurrency"]), f"{row['tokens_per_s']:.0f}", f"{row['us_a_part']:.0f}", *between)
    Console().print(table)


if __name__ == "__main__":
    main()
