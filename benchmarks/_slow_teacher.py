"""A server that speaks Gemini's protocol and answers every request after a fixed time, in a process of its own."""

import asyncio
import json
import multiprocessing
from multiprocessing.connection import Connection

THINK = (
    "Step 1: The question asks for the thing on the left of the chair, which stands near the middle of the room. "
    "Step 2: From there the table is the only object on that side of it. Conclusion: It is the table."
)
GOOD = f"<think>{THINK}</think><answer>The table.</answer>"
CHECKED = "<answer>The table.</answer>"
CHECK_MARK = b"from these thoughts alone"


def _response(text: str) -> bytes:
    candidate = {"content": {"role": "model", "parts": [{"text": text}]}, "finishReason": "STOP"}
    usage = {"promptTokenCount": 200, "candidatesTokenCount": 60, "thoughtsTokenCount": 500}
    body = json.dumps({"candidates": [candidate], "usageMetadata": usage}).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class _Protocol(asyncio.Protocol):
    """One connection; requests come one after the other, as HTTP/1.1 clients send them."""

    def __init__(self, latency: float):
        self._latency, self._received = latency, b""
        self._answers = _response(GOOD), _response(CHECKED)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        if len(body) >= int(length.partition(b":")[2]):
            self._received = b""
            asyncio.get_running_loop().call_later(self._latency, self._answer, CHECK_MARK in body)

    def _answer(self, checking: bool) -> None:
        if isinstance(self._transport, asyncio.Transport) and not self._transport.is_closing():
            self._transport.write(self._answers[checking])


def _serve(latency: float, pipe: Connection) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Protocol(latency), "127.0.0.1", 0, backlog=512)
        pipe.send(server.sockets[0].getsockname()[1])
        await loop.run_in_executor(None, pipe.recv)
        server.close()

    asyncio.run(run())


class SlowTeacher:
    """The server, as a context; `url` is its address.

    Args:
        latency: seconds until an answer.
    """

    def __init__(self, latency: float):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(latency, theirs), daemon=True)

    def __enter__(self) -> "SlowTeacher":
        self._process.start()
        self.url = f"http://127.0.0.1:{self._pipe.recv()}"
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.send("stop")
        self._process.join(timeout=10)
