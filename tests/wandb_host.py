"""A local host of wandb for tests: it answers every request alike, or accepts connections and says nothing."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Seen:
    """A request as received."""

    path: str
    authorization: str
    body: bytes


@dataclass
class WandbHost:
    """The host; `with WandbHost(401) as host` answers with this status. Later requests get `later`, silence if 0."""

    status: int = 200
    later: int | None = None
    seen: list[Seen] = field(default_factory=list)

    def __enter__(self) -> WandbHost:
        host, self.closing = self, threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                host.seen.append(Seen(self.path, self.headers.get("Authorization", ""), body))
                status = host.status if len(host.seen) == 1 or host.later is None else host.later
                if not status:
                    host.closing.wait(60)
                self.send_response(status or 500)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


@contextlib.contextmanager
def silent_port(late: bool = False) -> Iterator[int]:
    """Yield a port that accepts connections and says nothing; `late`: one byte a second, so that no read times out."""
    ended = threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError):
            connection, _ = listening.accept()
            connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
            while not ended.wait(1):
                connection.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        if late:
            threading.Thread(target=drip, daemon=True).start()
        yield int(listening.getsockname()[1])
        ended.set()
