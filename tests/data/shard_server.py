"""A server of shards on this machine that can fail, truncate, stall, redirect and change its mind."""

import socketserver
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ShardServer:
    """``files``: path -> bytes. ``faults``: path -> what to do with the next requests, one after another."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list] = {}
        self.requests: list[tuple[str, str]] = []
        self.ranges = True
        self.lengths = True
        self.url = ""
        self.closing = threading.Event()


def _handler(server: ShardServer):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def _answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            if "Content_Length" not in headers and server.lengths:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            if not server.lengths:
                self.close_connection = True

        def do_GET(self):
            path = self.path.partition("?")[0]
            given = self.headers.get("Range", "")
            server.requests.append((self.path, given))
            fault = server.faults[path].pop(0) if server.faults.get(path) else None
            body = server.files.get(path)
            if isinstance(fault, int):
                return self._answer(fault, b"sorry")
            if isinstance(fault, str) and fault.startswith("to "):
                return self._answer(302, Location=fault[3:])
            if fault == "stall":
                server.closing.wait(20)
                return self.connection.close()
            if fault == "reset":
                return self.connection.close()
            if body is None:
                return self._answer(404)
            tag, start = f'"{hash(body)}"', 0
            if server.ranges and given.startswith("bytes=") and self.headers.get("If-Range") == tag:
                start = int(given[6:].rstrip("-"))
            if isinstance(fault, tuple):
                kind, count = fault
                if kind == "lie":
                    return self._answer(200, body, Content_Length=str(count), ETag=tag)
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body) - start))
                self.send_header("ETag", tag)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
                self.end_headers()
                self.wfile.write(body[start : start + count])
                self.wfile.flush()
                if kind == "stop":
                    server.closing.wait(20)
                self.close_connection = True
                return None
            if start:
                span = f"bytes {start}-{len(body) - 1}/{len(body)}"
                return self._answer(206, body[start:], ETag=tag, Content_Range=span)
            return self._answer(200, body, ETag=tag)

    return Handler


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self):
        # The one of http.server asks for the machine's name, which can take seconds.
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request, client_address):
        pass


@contextmanager
def serving():
    """A running :class:`ShardServer`."""
    server = ShardServer()
    http = _Http(("127.0.0.1", 0), _handler(server))
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    try:
        yield server
    finally:
        server.closing.set()
        http.shutdown()
        http.server_close()
        thread.join(5)
