"""An HTTP server on this machine, served by threads of the test's own process."""

import sys
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def read_body(handler: BaseHTTPRequestHandler) -> bytes:
    """The request's body; ConnectionError where the client was killed before it had sent all."""
    length = int(handler.headers.get("Content-Length") or 0)
    body = handler.rfile.read(length)
    if len(body) < length:
        raise ConnectionError("the client is gone")
    return body


class LocalServer:
    """Serves requests by a handler while the context is open; `url` is its address.

    What a handler raises fails the test on leaving, but for connections of clients that were killed.
    """

    def serve_by(self, handler: type[BaseHTTPRequestHandler]) -> None:
        """Open the port; requests wait until the context is entered."""
        self.errors: list[str] = []
        errors = self.errors

        class Quiet(ThreadingHTTPServer):
            request_queue_size = 256
            daemon_threads = True

            def handle_error(self, request, client_address):
                if not isinstance(sys.exc_info()[1], OSError):
                    errors.append(traceback.format_exc())

        self._server = Quiet(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        assert not self.errors, self.errors[0]
