"""The report of runs that go on, served to this machine alone."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from moeconv.errors import MoeconvError
from runtime.report.build import make_page
from runtime.report.data import report_data
from runtime.report.read import RunLog

ADDRESS = "127.0.0.1"


class ReportServer(ThreadingHTTPServer):
    """Answers with the page, and at `data` with what the logs have now."""

    daemon_threads = True

    def __init__(self, runs: Sequence[RunLog], port: int) -> None:
        """Listen on the loopback.

        Args:
            runs: the runs, read once.
            port: 0 takes any.

        Raises:
            MoeconvError: the port is taken.
        """
        self._runs, self._lock = runs, threading.Lock()
        self._data: dict[str, Any] | None = None
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise MoeconvError(f"--port {port}: {error.strerror}; give another, or 0 for any that is free") from None

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{ADDRESS}:{self.server_port}/"

    def data(self) -> dict[str, Any]:
        """Read what is new in the logs, and give what the page draws."""
        with self._lock:
            news = [run.update() for run in self._runs]  # of each run, whatever the first says
            if any(news) or self._data is None:
                self._data = report_data(self._runs, live=True)
            return self._data


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer

    def do_GET(self) -> None:
        """Answer a browser of this machine; a foreign page that uses the loopback's address by another name gets nothing."""
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        if host not in (ADDRESS, "localhost"):
            self.send_error(403)
            return
        if self.path not in ("/", "/data"):
            self.send_error(404)
            return
        try:
            data = self.server.data()
        except MoeconvError as error:
            self.send_error(500, explain=str(error))
            return
        text = make_page(data) if self.path == "/" else json.dumps(data, separators=(",", ":"))
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8" if self.path == "/" else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay quiet: the screen is the user's."""
