"""A page in headless Chromium, driven over its debugging pipe: what it logs, what is in it, how it looks.

`python -m tests.runtime.report.browser PAGE PNG [WIDTH HEIGHT] [dark]` makes a picture of a page.
"""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_browser() -> str | None:
    """Give the path of a Chromium; None where there is none."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


class Browser:
    """One tab of a headless Chromium."""

    def __init__(self, *, width: int = 1400, height: int = 900, dark: bool = False) -> None:
        self._home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._numbers = itertools.count(1)
        self._pending = b""
        self.problems: list[str] = []
        """Errors, warnings and exceptions that the page logged."""
        self.requests: list[str] = []
        """Addresses that the page asked for."""
        commands, events = os.pipe(), os.pipe()
        # High numbers first: the browser takes exactly 3 and 4, which may be among these.
        low = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (commands[0], events[1])]

        def wire() -> None:
            os.dup2(low[0], 3)
            os.dup2(low[1], 4)

        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--disable-extensions"]
        flags += [
            "--disable-background-networking",
            "--no-first-run",
            "--hide-scrollbars",
            f"--user-data-dir={self._home.name}",
        ]
        program = find_browser()
        assert program is not None
        self._process = subprocess.Popen(
            [program, *flags, f"--window-size={width},{height}", "about:blank"],
            preexec_fn=wire, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for fd in (commands[0], events[1], *low):
            os.close(fd)
        self._out, self._in = commands[1], events[0]
        targets = self._call("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        self._session: str | None = None
        self._session = self._call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        self.resize(width, height)
        self.dark(dark)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)
        self._home.cleanup()

    def resize(self, width: int, height: int) -> None:
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def dark(self, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        """Load a page and wait until its scripts have run."""
        self._call("Page.navigate", url=url)
        deadline = time.monotonic() + 30
        while self.run("document.readyState") != "complete" or self.run("location.href") != url:
            assert time.monotonic() < deadline, f"{url} did not load"
            time.sleep(0.05)

    def run(self, script: str) -> Any:
        """Evaluate an expression of JavaScript."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, **options: Any) -> None:
        self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **options)

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """Save what the page looks like."""
        answer = self._call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if getattr(self, "_session", None):
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result
            self._notice(answer)

    def _notice(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(parameters["exceptionDetails"])[:500])
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.problems.append(parameters["entry"]["text"] + " " + parameters["entry"].get("url", ""))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.problems.append(str(parameters["args"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._in], [], [], 60)
            assert ready, "the browser does not answer"
            chunk = os.read(self._in, 1 << 16)
            assert chunk, "the browser has ended"
            self._pending += chunk
        text, self._pending = self._pending.split(b"\0", 1)
        found: dict[str, Any] = json.loads(text)
        return found


def main() -> None:
    page, picture, *rest = sys.argv[1:]
    dark = "dark" in rest
    size = [int(part) for part in rest if part != "dark"] or [1400, 900]
    with Browser(width=size[0], height=size[1], dark=dark) as browser:
        browser.open(page if "://" in page else Path(page).resolve().as_uri())
        height = browser.run("document.documentElement.scrollHeight")
        browser.resize(size[0], height)
        time.sleep(0.3)
        browser.picture(Path(picture))
        print("\n".join(browser.problems) or "no console error")


if __name__ == "__main__":
    main()
