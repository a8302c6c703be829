"""A local server that speaks the batch interfaces of Gemini and OpenAI, and misbehaves by plan."""

import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, urlsplit

from threedr1.datasets.synthesis import Operation, build_batches
from threedr1.datasets.synthesis.batches import Batches

from .local_server import LocalServer, read_body
from .teacher_server import make_teacher, moody, prompt_of

# how a batch may end; all but these end well
ENDS = {
    "expired": ("expired", "BATCH_STATE_EXPIRED"),
    "half expired": ("expired", "BATCH_STATE_EXPIRED"),
    "failed": ("failed", "BATCH_STATE_FAILED"),
    "queue full": ("failed", "BATCH_STATE_FAILED"),
    "cancelled": ("cancelled", "BATCH_STATE_CANCELLED"),
}
Answered = tuple[int, dict[str, str], bytes | dict]


def gemini_prompt(body: dict) -> str:
    return body["contents"][0]["parts"][-1]["text"]


class BatchServer(LocalServer):
    """One account's files and batches.

    `plan` says by the number of a batch what becomes of it: an end of ENDS, `missing`, `malformed` and `error` (of its
    first row; with `once` at the end only for the first download), `gone`. `refuse` says by the number of a try to
    submit which (status, headers) it gets; headers of "started" mean that the batch was started for all that. Answers
    to all tries come after `pause` seconds. A batch works until it was looked at `looks` times, or for ever where that
    is None. With `flaky` n every n-th request fails by turns: busy, dropped, cut off; starts of batches do not.
    """

    def __init__(self, kind: str, *, plan=None, refuse=None, looks: int | None = 1, pause=0.0, message="no", flaky=0):
        self.pause, self.flaky = pause, flaky
        self.kind, self.plan, self.refuse, self.looks, self.message = kind, plan or {}, refuse or {}, looks, message
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict] = {}
        self.paths: list[str] = []
        self.bodies: list[dict] = []  # of every request of every batch
        self.keys: list[str] = []
        self.answered: Counter[str] = Counter()  # prompts that were answered, which is what is paid for
        self.tries = 0
        self._lock = threading.Lock()
        self._mood = moody(kind)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def _serve(self):
                body = read_body(self)
                headers = {name.lower(): value for name, value in self.headers.items()}
                with outer._lock:
                    outer.paths.append(f"{self.command} {self.path}")
                    status, headers, answer = outer.serve(self.command, self.path, headers, body)
                if self.command == "POST" and "batch" in self.path.lower() and "cancel" not in self.path:
                    time.sleep(outer.pause)
                if status == 0:
                    self.close_connection = True
                    return
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                if "Content-Length" in headers:
                    self.close_connection = True  # more is promised than sent
                else:
                    self.send_header("Content-Length", str(len(content)))
                try:
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    self.close_connection = True

            do_GET = do_POST = _serve

            def log_message(self, format, *args):
                pass

        self.serve_by(Handler)

    # ---- the two protocols

    def serve(self, method: str, path: str, headers: dict, body: bytes) -> Answered:
        place, query = urlsplit(path).path, parse_qs(urlsplit(path).query)
        starts = method == "POST" and (place == "/v1/batches" or "batchGenerate" in place)
        if self.flaky and not starts and len(self.paths) % self.flaky == 0:
            failures = ((503, {}, {}), (0, {}, b""), (200, {"Content-Length": "4000"}, b'{"na'))
            return failures[len(self.paths) // self.flaky % 3]
        return getattr(self, f"_{self.kind}")(method, place, query, headers, body)

    def _openai(self, method, place, query, headers, body) -> Answered:
        assert headers["authorization"] == "Bearer secret-key"
        if (method, place) == ("POST", "/v1/files"):
            assert re.search(rb'name="purpose"\r\n\r\nbatch\r\n', body), body[:300]
            boundary = headers["content-type"].split("boundary=")[1].encode()
            part = next(part for part in body.split(b"--" + boundary) if b'name="file"' in part)
            return 200, {}, {"id": self._keep(part.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n")), "object": "file"}
        if place == "/v1/batches" and method == "POST":
            sent = json.loads(body)
            assert sent["endpoint"] == "/v1/chat/completions" and sent["completion_window"] == "24h"
            return self._start(sent["input_file_id"], sent["metadata"]["threedr1"])
        if place == "/v1/batches":  # two a page, so that pages are turned
            names = list(reversed(self.batches))
            first = names.index(query["after"][0]) + 1 if "after" in query else 0
            shown = [self._shown(name) for name in names[first : first + 2]]
            return 200, {}, {"object": "list", "data": shown, "has_more": first + 2 < len(names)}
        if match := re.fullmatch(r"/v1/files/(.+)/content", place):
            return self._download(match[1])
        match = re.fullmatch(r"/v1/batches/([^/]+)(/cancel)?", place)
        return self._look(match[1], bool(match[2]))

    def _gemini(self, method, place, query, headers, body) -> Answered:
        assert place.startswith("/sent/") or headers["x-goog-api-key"] == "secret-key"
        if re.fullmatch(r"/upload/v1(beta)?/files", place):
            return 200, {"X-Goog-Upload-URL": f"{self.url}/sent/here"}, {}
        if place.startswith("/sent/"):
            assert headers["x-goog-upload-command"].endswith("finalize")
            return 200, {"X-Goog-Upload-Status": "final"}, {"file": {"name": f"files/{self._keep(body)}"}}
        if place.endswith("/models/some-model:batchGenerateContent"):
            batch = json.loads(body)["batch"]
            return self._start(batch["inputConfig"]["fileName"].removeprefix("files/"), batch["displayName"])
        if re.fullmatch(r"/v1(beta)?/batches", place):
            names = list(reversed(self.batches))
            first = int(query.get("pageToken", ["0"])[0])
            page = {"operations": [self._shown(name) for name in names[first : first + 2]]}
            return 200, {}, page | ({"nextPageToken": str(first + 2)} if first + 2 < len(names) else {})
        if match := re.fullmatch(r"/v1(?:beta)?/files/(.+):download", place):
            return self._download(match[1])
        match = re.fullmatch(r"/v1(?:beta)?/batches/([^/:]+)(:cancel)?", place)
        assert match, place
        return self._look(match[1], bool(match[2]))

    # ---- what both have in common

    def _keep(self, content: bytes) -> str:
        name = f"file-{len(self.files)}"
        self.files[name] = content
        return name

    def _error(self, status: int, headers: dict) -> Answered:
        return status, headers, {"error": {"code": status, "message": self.message, "status": "X"}}

    def _start(self, file: str, token: str) -> Answered:
        number, self.tries = self.tries, self.tries + 1
        status, headers = self.refuse.get(number, (200, {}))
        if status != 200 and headers != "started":
            return self._error(status, headers)
        name = f"batch-{len(self.batches)}"
        rows = [json.loads(line) for line in self.files[file].splitlines()]
        self.batches[name] = {"token": token, "rows": rows, "looks": 0, "plan": self.plan.get(len(self.batches), "")}
        self.keys += [row["custom_id"] if self.kind == "openai" else row["key"] for row in rows]
        self.bodies += [row["body"] if self.kind == "openai" else row["request"] for row in rows]
        return (status, {}, {}) if status != 200 else (200, {}, self._shown(name))

    def _ended(self, name: str) -> bool:
        batch = self.batches[name]
        return batch.get("cancelled") or (self.looks is not None and batch["looks"] > self.looks)

    def _look(self, name: str, cancel: bool) -> Answered:
        if name not in self.batches or self.batches[name]["plan"] == "gone":
            return self._error(404, {})
        batch = self.batches[name]
        if cancel:
            batch["cancelled"], batch["plan"] = True, "cancelled" if not batch["plan"] else batch["plan"]
            return 200, {}, self._shown(name) if self.kind == "openai" else {}
        batch["looks"] += 1
        return 200, {}, self._shown(name)

    def _shown(self, name: str) -> dict:
        batch, ended = self.batches[name], self._ended(name)
        plan = batch["plan"] if ended else ""
        if ended and "file" not in batch:
            batch["file"] = self._keep(self._results(batch)) if plan not in ("expired", "failed", "queue full") else ""
        file = batch.get("file", "") if ended else ""
        states = (
            ENDS.get(plan, ("completed", "BATCH_STATE_SUCCEEDED")) if ended else ("in_progress", "BATCH_STATE_RUNNING")
        )
        if self.kind == "openai":
            shown = {"id": name, "object": "batch", "status": states[0], "metadata": {"threedr1": batch["token"]}}
            code = "token_limit_exceeded" if plan == "queue full" else "invalid"
            if states[0] == "failed":
                shown["errors"] = {"object": "list", "data": [{"code": code, "message": self.message}]}
            return shown | ({"output_file_id": file} if file else {})
        metadata = {"displayName": batch["token"], "state": states[1], "news": "of a later release"}
        if file:
            metadata["output"] = {"responsesFile": f"files/{file}"}
        return {"name": f"batches/{name}", "metadata": metadata, "done": ended}

    def _results(self, batch: dict) -> bytes:
        """The file of replies, which the account is charged for."""
        rows, plan = batch["rows"], batch["plan"]
        if plan in ("half expired", "cancelled"):
            rows = rows[: len(rows) // 2]
        lines = [json.dumps(self._result(row)).encode() for row in reversed(rows)]
        return b"\n".join(lines) + b"\n" if lines else b""

    def _result(self, row: dict) -> dict:
        body = row["body"] if self.kind == "openai" else row["request"]
        prompt = prompt_of(body) if self.kind == "openai" else gemini_prompt(body)
        _, _, reply = self._mood(0, body)
        self.answered[prompt] += 1
        if self.kind == "openai":
            return {
                "id": "x",
                "custom_id": row["custom_id"],
                "response": {"status_code": 200, "body": reply},
                "error": None,
            }
        return {"key": row["key"], "response": {**reply, "news": 1}}

    def _download(self, name: str) -> Answered:
        content = self.files[name]
        batch = next(batch for batch in self.batches.values() if batch.get("file") == name)
        batch["downloads"] = batch.get("downloads", 0) + 1
        plan, once = batch["plan"].removesuffix(" once"), batch["plan"].endswith(" once")
        if plan in ("missing", "malformed", "error") and not (once and batch["downloads"] > 1):
            first, rest = content.split(b"\n", 1)
            row = json.loads(first)
            failed = {
                "openai": {
                    "custom_id": row.get("custom_id"),
                    "response": {"status_code": 500, "body": {}},
                    "error": None,
                },
                "gemini": {"key": row.get("key"), "error": {"code": 13, "message": "internal"}},
            }[self.kind]
            content = {"missing": rest, "malformed": first[: len(first) // 2] + b"\n" + rest}.get(
                plan, json.dumps(failed).encode() + b"\n" + rest
            )
        return 200, {"Content-Type": "application/jsonl"}, content


def make_batches(kind: str, url: str, monkeypatch, size: int = 5000, **changes) -> Batches:
    teacher = make_teacher(kind, url, monkeypatch, **changes)
    return build_batches(teacher, Operation(batch_size=size, poll_interval=0.02))
