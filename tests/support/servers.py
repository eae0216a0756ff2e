"""Real servers on this machine for tests of remote folders, with faults to switch on."""

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ssl import SSLContext
from typing import Any


class Fault(Enum):
    """What an answer does wrong, apart from an HTTP status."""

    SILENT = auto()  # accepts the request and never answers
    STOPS_MIDWAY = auto()  # sends half of the body, and then nothing
    CUT = auto()  # sends half of the body and closes the connection
    FLIPPED = auto()  # sends one wrong bit
    SHORT = auto()  # sends half of the body and says that it is all
    LONG = auto()  # sends the body twice
    SLOW = auto()  # sends the body in ten pieces with pauses between them


class FileServer:
    """Serves `files` by path over HTTP, or HTTPS with a `context`; knows no ranges.

    `faults` of a path are used up one a request, an int being an HTTP status; `requests` counts.
    Both are by path and query as sent, `files` by path alone.
    """

    def __init__(self, context: SSLContext | None = None) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: defaultdict[str, list[Fault | int]] = defaultdict(list)
        self.requests: defaultdict[str, int] = defaultdict(int)
        self.seconds_between_pieces = 0.1
        self.ended = threading.Event()
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        if context is not None:
            self._http.socket = context.wrap_socket(
                self._http.socket, server_side=True, do_handshake_on_connect=False
            )
        self.address = f"127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))
        self._thread.start()

    def next_fault(self, path: str) -> Fault | int | None:
        """Counts a request, and takes the next fault of its path."""
        with self._lock:
            self.requests[path] += 1
            return self.faults[path].pop(0) if self.faults[path] else None

    def close(self) -> None:
        """Ends all answers that are under way, and the server."""
        self.ended.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@contextmanager
def file_server(context: SSLContext | None = None) -> Iterator[FileServer]:
    """A server for the time of a test."""
    server = FileServer(context)
    try:
        yield server
    finally:
        server.close()


def _handler_of(server: FileServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            fault, body = server.next_fault(self.path), server.files.get(path)
            if isinstance(fault, int) or body is None:
                self.send_error(fault if isinstance(fault, int) else 404)
                return
            if fault is Fault.SILENT:
                server.ended.wait()
                return
            half = body[: len(body) // 2]
            if fault is Fault.SHORT:
                body = half
            elif fault is Fault.LONG:
                body += body
            elif fault is Fault.FLIPPED:
                body = body[:-1] + bytes([body[-1] ^ 1])
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if fault is Fault.SLOW:
                for start in range(0, len(body), len(body) // 10):
                    self.wfile.write(body[start : start + len(body) // 10])
                    server.ended.wait(server.seconds_between_pieces)
                return
            self.wfile.write(half if fault in (Fault.CUT, Fault.STOPS_MIDWAY) else body)
            if fault is Fault.STOPS_MIDWAY:
                server.ended.wait()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
