"""本机的一个 HTTP 服务器：给出一个文件夹里的文件，会断、会忙、会死；记着每个请求。"""

from __future__ import annotations

import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Loopback(ThreadingHTTPServer):
    """with Loopback(folder) as server: server.address 就是 folder。

    drop: 每几个请求毁掉一个（轮流：不答就断、503、答一半就断），fails: 至多毁几个；
    dies_after: 这么多个请求之后一概不答；status: 路径 → 一概这样答；
    ranges、listing: 认不认 Range、给不给目录页；paths: 收到的请求。
    """

    daemon_threads = True

    def __init__(
        self,
        root: Path,
        drop: int = 0,
        fails: int | None = None,
        dies_after: int | None = None,
        status: dict[str, int] | None = None,
        ranges: bool = True,
        listing: bool = True,
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.drop, self.fails, self.dies_after, self.status = root, drop, fails, dies_after, status or {}
        self.ranges, self.listing = ranges, listing
        self.paths: list[str] = []
        self.said: list[str] = []
        self.lock = threading.Lock()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Loopback:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        self.said.append(f"{client_address} has gone")  # 不必印出来


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Loopback  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        self.server.said.append(format % args)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, path = self.server, self.path.lstrip("/").rstrip("/")
        with server.lock:
            server.paths.append(path)
            count = len(server.paths)
        turn, left = divmod(count, server.drop or len(server.paths) + 1)
        broken = turn % 3 if server.drop and not left and turn <= (server.fails or turn) else None
        if broken == 0 or (server.dies_after is not None and count > server.dies_after):
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(2)
            return
        if broken == 1 or path in server.status:
            self.answer(503 if broken == 1 else server.status[path], b"no")
            return
        file = server.root / path
        if file.is_file():
            self.give(file.read_bytes(), halfway=broken == 2)
        elif file.is_dir() and server.listing:
            names = "".join(f'<a href="{p.name}{"/" * p.is_dir()}">x</a>' for p in file.iterdir())
            self.answer(200, f'<a href="../">up</a><a href="?C=N">name</a>{names}'.encode(), "text/html")
        else:
            self.answer(404, b"no")

    def give(self, data: bytes, halfway: bool) -> None:
        asked = self.headers.get("Range")
        if asked and self.server.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            self.answer(206, data[int(first) : int(last) + 1 if last else None] if first else data[-int(last) :])
        else:
            self.answer(200, data, halfway=halfway)

    def answer(self, status: int, data: bytes, kind: str = "application/octet-stream", halfway: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if halfway:
            self.close_connection = True
            data = data[: len(data) // 2]
        if self.command != "HEAD":
            self.wfile.write(data)
