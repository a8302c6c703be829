"""Local servers that speak Gemini's and OpenAI's protocols from a script, and teachers that ask them."""

import asyncio
import hashlib
import json
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from threedr1.datasets.synthesis.gemini_teacher import GeminiTeacher
from threedr1.datasets.synthesis.openai_teacher import OpenAITeacher
from threedr1.datasets.synthesis.sources import Question
from threedr1.datasets.synthesis.teacher import Reply, Request, RetryOptions

from .local_server import LocalServer, read_body

KEY = "secret-key"
FAST = RetryOptions(attempts=3, first_delay=0.001, longest_delay=0.01)
THINK = (
    "Step 1: The question asks for the thing on the left of the chair, which stands near the middle of the room. "
    "Step 2: From there the table is the only object on that side of it. Conclusion: It is the table."
)
GOOD = f"<think>{THINK}</think><answer>The table.</answer>"
MALFORMED = f"<think>{THINK}<answer>The table.</answer>"


def question(**changes) -> Question:
    box = (0.5, 0.25, 0.45, 0.5, 0.5, 0.9, 0.0)
    base = Question(
        "scanqa-1", "scanqa", "s", "qa", "What is left of the chair?", (3,), ("table",), ("table",), (box,)
    )
    return replace(base, **changes)


REQUEST = Request(question(), "the prompt")


class Server(LocalServer):
    """A local HTTP server that answers from a script of (status, headers, body) and keeps what it was sent.

    A status of None drops the connection. `drip` seconds pass between two bytes of a body.
    """

    def __init__(self, script, delay: float = 0.0, drip: float = 0.0):
        self.requests: list[dict] = []
        self.in_flight = self.most_in_flight = self.connections = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            disable_nagle_algorithm = True
            protocol_version = "HTTP/1.1"

            def setup(self):
                outer.connections += 1
                super().setup()

            def do_POST(self):
                body = json.loads(read_body(self))
                with outer._lock:
                    row = {"path": self.path, "headers": dict(self.headers), "body": body, "time": time.monotonic()}
                    outer.requests.append(row)
                    number = len(outer.requests) - 1
                    outer.in_flight += 1
                    outer.most_in_flight = max(outer.most_in_flight, outer.in_flight)
                time.sleep(delay)
                status, headers, answer = script(number, body)
                with outer._lock:
                    outer.in_flight -= 1
                if status is None:
                    self.close_connection = True
                    return
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                if "Content-Length" in headers:
                    self.close_connection = True  # the script promises more than it sends
                else:
                    self.send_header("Content-Length", str(len(content)))
                try:
                    self.end_headers()
                    self._send(content)
                except OSError:
                    self.close_connection = True  # the client was killed or gave up

            def _send(self, content):
                if not drip:
                    self.wfile.write(content)
                    return
                for byte in content:
                    self.wfile.write(bytes([byte]))
                    time.sleep(drip)

            def log_message(self, format, *args):
                pass

        self.serve_by(Handler)


def gemini_body(text: str, **changes) -> dict:
    parts = [{"text": "hidden", "thought": True}, {"text": text}]
    candidate = {"content": {"role": "model", "parts": parts}, "finishReason": "STOP", **changes}
    usage = {"promptTokenCount": 11, "candidatesTokenCount": 5, "thoughtsTokenCount": 2}
    return {"candidates": [candidate], "usageMetadata": usage}


def openai_body(text: str, **changes) -> dict:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", **changes}
    return {"choices": [choice], "usage": {"prompt_tokens": 11, "completion_tokens": 7}}


KINDS = {"gemini": gemini_body, "openai": openai_body}


def prompt_of(body: dict) -> str:
    """The prompt of a request of either protocol."""
    return body["contents"][0]["parts"][0]["text"] if "contents" in body else body["messages"][0]["content"]


def oracle(kind: str):
    """Thinks about the table and answers so, and answers a check in the same words."""

    def script(number: int, body: dict):
        return 200, {}, KINDS[kind]("<answer>The table.</answer>" if is_check(prompt_of(body)) else GOOD)

    return script


def moody(kind: str):
    """Answers by the prompt alone: now and then with a broken form, and to every prompt in the same way each time."""

    def script(number: int, body: dict):
        prompt = prompt_of(body)
        if is_check(prompt):
            return 200, {}, KINDS[kind]("<answer>The table.</answer>")
        mood = hashlib.sha256(prompt.encode()).digest()[0] % 8
        return 200, {}, KINDS[kind](MALFORMED if mood == 0 else GOOD)

    return script


def is_check(prompt: str) -> bool:
    return "from these thoughts alone" in prompt


def make_teacher(kind: str, url: str, monkeypatch, **changes):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    settings = {"timeout": 10, "retries": FAST, **changes}
    if kind == "gemini":
        pytest.importorskip("google.genai")
        monkeypatch.setenv("GEMINI_API_KEY", KEY)
        return GeminiTeacher("some-model", base_url=url, thinking_budget=128, **settings)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return OpenAITeacher("some-model", base_url=f"{url}/v1/", **settings)


def ask(teacher, request: Request = REQUEST) -> Reply:
    async def once() -> Reply:
        try:
            return await teacher.ask(request)
        finally:
            await teacher.close()

    return asyncio.run(once())


def add_questions(root: Path, count: int) -> None:
    """Put so many questions about the first ScanQA row's target into a data root."""
    path = root / "annotations" / "ScanQA_v1.0_train.json"
    rows = json.loads(path.read_text())
    more = [{**rows[0], "question": f"What is left of chair {n}?", "question_id": f"more-{n}"} for n in range(count)]
    path.write_text(json.dumps(rows + more))
