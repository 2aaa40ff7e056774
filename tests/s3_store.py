"""An S3 server in this process (moto's), behind a proxy that fails when it is told to."""

import contextlib
import http.client
import logging
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

REFUSALS = {
    "503": b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>",
    "403": b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>",
}
KEYS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: "Store"

    def _pass_on(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        fault = self.store.next_fault(self.command, self.path)
        if fault == "cut" and self.command in ("PUT", "POST"):
            self.rfile.read(size // 2)
            return self._hang_up()
        body = self.rfile.read(size)
        if fault == "stall":
            self.store.closing.wait(60)
            return self._hang_up()
        if fault in REFUSALS:
            return self._answer(int(fault), {"Content-Type": "application/xml"}, REFUSALS[fault])
        target = http.client.HTTPConnection("127.0.0.1", self.store.moto_port, timeout=60)
        target.request(self.command, self.path, body, dict(self.headers))
        response = target.getresponse()
        content = response.read()
        target.close()
        if fault == "unanswered":  # done, and nobody hears of it
            return self._hang_up()
        headers = {name: value for name, value in response.getheaders() if name not in OWN}
        if self.command == "HEAD":
            headers["Content-Length"] = response.headers.get("Content-Length", "0")
        self._answer(response.status, headers, content, cut=fault == "cut")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

    def _answer(self, status: int, headers: dict[str, str], body: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(2)

    def log_message(self, *_: object) -> None:
        pass


OWN = ("Content-Length", "Connection", "Transfer-Encoding", "Server", "Date")


class Store:
    """The server, and which of its answers fail."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.closing, self._lock = threading.Event(), threading.Lock()
        self._fault: Callable[[str, str], str | None] = lambda method, path: None
        self.requests: list[tuple[str, str]] = []
        self._moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._moto.start()
        self.moto_port = self._moto._server.port  # type: ignore[union-attr]
        handler = type("Proxy", (_Proxy,), {"store": self})
        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._proxy.daemon_threads = True
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._proxy.server_port}"
        self.environment = KEYS | {"AWS_ENDPOINT_URL": self.url}

    def next_fault(self, method: str, path: str) -> str | None:
        with self._lock:
            self.requests.append((method, path))
            return self._fault(method, path)

    def fail(self, fault: Callable[[str, str], str | None]) -> None:
        """Set which requests fail: `503`, `cut`, `stall`, `unanswered` or None, by method and path."""
        with self._lock:
            self._fault = fault

    def heal(self) -> None:
        self.fail(lambda method, path: None)

    def files(self) -> Any:
        """The file system at the server itself, without faults."""
        import s3fs

        return s3fs.S3FileSystem(
            key="key",
            secret="secret",
            endpoint_url=f"http://127.0.0.1:{self.moto_port}",
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def close(self) -> None:
        self.closing.set()
        self._proxy.shutdown()
        self._proxy.server_close()
        self._moto.stop()


@contextlib.contextmanager
def start() -> Iterator[Store]:
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    store = Store()
    try:
        yield store
    finally:
        store.close()
