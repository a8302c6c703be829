"""A headless Chromium that tests drive: it clicks, types, uploads and reads, over the DevTools protocol on two pipes.

It needs no package. Page text is read by JavaScript expressions; console messages and failed requests are kept.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
# file descriptors that Chromium reads commands from and writes answers to
_COMMANDS, _ANSWERS = 3, 4


def find_chromium() -> str | None:
    """The browser's path, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """One page in one browser.

    Attributes:
        problems: what the console called an error or a warning, exceptions, and requests that failed.
    """

    def __init__(self, program: str, folder: Path, *, width: int = 1280, height: int = 1000):
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._count, self._rest = 0, b""
        read_commands, self._to = os.pipe()
        self._from, write_answers = os.pipe()
        kept = [os.dup2(read_commands, 40), os.dup2(write_answers, 41)]
        command = [program, "--headless", "--no-sandbox", "--no-first-run", "--disable-background-networking"]
        command += ["--disable-dev-shm-usage", "--remote-debugging-pipe", "--enable-unsafe-swiftshader"]
        command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}", "about:blank"]
        # bash moves the pipes to the two numbers that Chromium expects
        script = f'exec {_COMMANDS}<&40 {_ANSWERS}>&41 40<&- 41>&-; exec "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command],
            pass_fds=kept,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for number in (read_commands, write_answers, *kept):
            os.close(number)
        page = next(each for each in self._send("Target.getTargets")["targetInfos"] if each["type"] == "page")
        attached = self._send("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)
        os.close(self._to)
        os.close(self._from)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command to the page; RuntimeError where the browser refuses it."""
        return self._send(method, self._session, **parameters)

    def _send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + 60
        while True:
            answer = self._receive(until)
            if answer is None:
                raise TimeoutError(f"The browser did not answer {method} within a minute.")
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _receive(self, until: float) -> dict[str, Any] | None:
        """The next message, its problem noted; None where none came in time."""
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, until - time.monotonic()))
            part = os.read(self._from, 1 << 20) if ready else b""
            if not part:
                return None
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(line)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, event: dict[str, Any]) -> None:
        if method == "Runtime.consoleAPICalled" and event["type"] in ("error", "warning", "assert"):
            words = " ".join(str(part.get("value", part.get("description", ""))) for part in event["args"])
            self.problems.append(f"console {event['type']}: {words}")
        elif method == "Runtime.exceptionThrown":
            self.problems.append(f"exception: {json.dumps(event['exceptionDetails'])[:600]}")
        elif method == "Log.entryAdded" and event["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"log: {event['entry']['text']} {event['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])

    def wait_a_little(self, seconds: float) -> None:
        """Let time go by, listening."""
        until = time.monotonic() + seconds
        while self._receive(until) is not None:
            pass

    def open(self, url: str) -> None:
        """Go to a page."""
        self.send("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives, as JSON carries it; RuntimeError where it throws."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 60) -> Any:
        """The value of an expression as soon as it is true; TimeoutError with the page's text where it never is."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            found = self.value(expression)
            if found not in (None, False, "", 0):  # an element comes as {}
                return found
            self.wait_a_little(0.1)
        raise TimeoutError(f"{expression} stayed false; the page says: {self.value('document.body.innerText')}")

    def click(self, expression: str) -> None:
        """Click the middle of the element that an expression gives, once it stands still and nothing covers it."""
        middle = (
            f"(() => {{ const e = {expression}; if (!e) return null; e.scrollIntoView({{block: 'center'}});"
            "const r = e.getBoundingClientRect(), x = r.x + r.width / 2, y = r.y + r.height / 2;"
            "const top = document.elementFromPoint(x, y);"
            "return top && (e.contains(top) || top.contains(e)) ? [x, y] : null; })()"
        )
        place = self.wait_for(middle)
        while True:
            self.wait_a_little(0.2)
            before, place = place, self.wait_for(middle)
            if before == place:
                break
        for kind in ("mousePressed", "mouseReleased"):
            where = {"x": place[0], "y": place[1], "button": "left", "clickCount": 1}
            self.send("Input.dispatchMouseEvent", type=kind, **where)

    def type(self, expression: str, text: str) -> None:
        """Put a text in the place of what stands in the field that an expression gives."""
        self.click(expression)
        self.value(f"({expression}).select()")
        self.send("Input.insertText", text=text)

    def upload(self, selector: str, *paths: Path) -> None:
        """Choose files in a file field."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def screenshot(self, path: Path, *, whole: bool = False) -> Path:
        """A picture of what is to be seen, or of the whole page."""
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path
