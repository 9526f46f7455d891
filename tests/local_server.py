"""A real HTTP server on this machine that can be told to misbehave."""

import contextlib
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HANG_UP = -1  # in place of a status: no answer at all


@dataclass
class Served:
    """One path. statuses, cuts and stalls hold one value for each of the first requests: an HTTP status instead of the file,
    the number of bytes after which the connection is cut, or after which nothing comes until `go` is set."""

    data: bytes = b""
    etag: str = '"one"'
    ranges: bool = True
    chunked: bool = False
    location: str = ""
    headers: dict = field(default_factory=dict)
    statuses: list = field(default_factory=list)
    cuts: list = field(default_factory=list)
    stalls: list = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        self.close_connection = True
        with self.server.lock:
            self.server.requests.append((self.command, self.path, dict(self.headers)))
            served = self.server.files.get(self.path) or Served(statuses=[404])
            status, cut, stall = ((values.pop(0) if values else None) for values in (served.statuses, served.cuts, served.stalls))
        if status == HANG_UP:
            return None
        if status or served.location:
            return self.head(status or 302, served.headers | ({"Location": served.location} if served.location else {}), 0)
        start, wanted = 0, self.headers.get("Range")
        if wanted and served.ranges and self.headers.get("If-Range", served.etag) == served.etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        size = len(served.data)
        headers = dict(served.headers) | ({"ETag": served.etag} if served.etag else {})
        if start >= size > 0:
            return self.head(416, headers | {"Content-Range": f"bytes */{size}"}, 0)
        if start:
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        self.head(
            206 if start else 200, headers | ({"Transfer-Encoding": "chunked"} if served.chunked else {}), None if served.chunked else size - start
        )
        if self.command == "HEAD":
            return None
        with contextlib.suppress(OSError):  # the client went away
            self.body(served, served.data[start:], cut, stall)
        return None

    def head(self, status, headers, length):
        self.send_response(status)
        self.send_header("Connection", "close")  # or clients that keep connections would take this one for alive
        for name, value in headers.items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def body(self, served, data, cut, stall):
        end = len(data) if cut is None and stall is None else min(x for x in (cut, stall) if x is not None)
        for at in range(0, end, 1 << 16):
            piece = data[at : min(end, at + (1 << 16))]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if served.chunked else piece)
        self.wfile.flush()
        if stall is not None:
            served.go.wait(20)
        elif cut is None and served.chunked:
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving():
    """The server: `files` by path, `url(path)`, `requests` as (method, path, headers), `gets(path)` their headers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.files, server.requests, server.lock = {}, [], threading.Lock()
    server.url = lambda path: f"http://127.0.0.1:{server.server_port}{path}"
    server.gets = lambda path: [headers for method, where, headers in server.requests if method == "GET" and where == path]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        for served in server.files.values():
            served.go.set()
        server.shutdown()
        server.server_close()
        thread.join()
