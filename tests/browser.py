"""A headless Chromium, driven through its remote protocol."""

from __future__ import annotations

import base64
import json
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

PATIENCE = 120  # seconds


class Browser:
    """One page of a Chromium of its own.

    Args:
        program: the Chromium to start.
    """

    def __init__(self, program: str):
        import websocket

        self._home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--remote-debugging-port=0", "--remote-allow-origins=*", f"--user-data-dir={self._home.name}"]
        self._process = subprocess.Popen([program, *options, "about:blank"], stderr=subprocess.DEVNULL)
        told = Path(self._home.name) / "DevToolsActivePort"
        self._until(lambda: told.exists() and told.read_text().strip())
        address = f"http://127.0.0.1:{told.read_text().split()[0]}/json"
        with urllib.request.urlopen(address, timeout=PATIENCE) as answer:
            page = next(each for each in json.load(answer) if each["type"] == "page")
        self._socket = websocket.create_connection(page["webSocketDebuggerUrl"], timeout=PATIENCE)
        self._sent = 0
        self._events: list[dict[str, Any]] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> Any:
        self._sent += 1
        self._socket.send(json.dumps({"id": self._sent, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == self._sent:
                assert "error" not in message, message["error"]
                return message["result"]
            self._events.append(message)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        found = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def open(
        self,
        file: Path,
        width: int = 1280,
        height: int = 900,
        scheme: str = "light",
        drawn: str = "document.documentElement?.dataset.drawn",
    ) -> None:
        """Open a report and wait until it is drawn, which a JavaScript expression tells."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._events.clear()
        self.send("Page.navigate", url=file.absolute().as_uri())
        self._until(lambda: self.run(drawn) or self.complaints())

    def complaints(self) -> list[str]:
        """Errors and warnings of the page since it was opened, and whatever it asked a network for."""
        found = []
        for event in self._events:
            method, about = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown" or (
                method == "Log.entryAdded" and about["entry"]["level"] != "info"
            ):
                found.append(json.dumps(about))
            if method == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
                found.append(json.dumps(about["args"]))
            if method == "Network.requestWillBeSent" and not about["request"]["url"].startswith(
                ("file:", "data:", "blob:")
            ):
                found.append(about["request"]["url"])
        return found

    def screenshot(self, out: Path, height: int | None = None) -> None:
        """The whole page, or its upper part, as PNG."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        out.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._home.cleanup()

    def _until(self, happened: Any) -> None:
        end = time.monotonic() + PATIENCE
        while not happened():
            assert time.monotonic() < end, "Chromium takes too long"
            time.sleep(0.1)
