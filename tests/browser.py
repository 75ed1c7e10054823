"""Headless Chromium, driven over a pipe by its DevTools protocol."""

import base64
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path

FOUND = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe")


class Browser:
    """One page; `problems` are exceptions, the console's errors, and files that did not load, since the last `open`."""

    def __init__(self, profile: Path):
        from_us, self._out = os.pipe()
        self._in, to_us = os.pipe()
        command = [FOUND, *OPTIONS, "--hide-scrollbars", f"--user-data-dir={profile}", "about:blank"]
        shell = f'exec "$@" 3<&{from_us} 4>&{to_us}'  # the descriptors that Chromium reads and writes
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command], pass_fds=(from_us, to_us), stderr=subprocess.DEVNULL
        )
        os.close(from_us)
        os.close(to_us)
        self._stream = os.fdopen(self._in, "rb")
        self._numbers, self._session, self._loaded = itertools.count(1), None, False
        self.problems: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, path: Path, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Load a file and wait until it is loaded."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self.problems, self._loaded = [], False
        self._call("Page.navigate", url=path.resolve().as_uri())
        while not self._loaded:
            self._take()
        self.evaluate("new Promise(done => setTimeout(done, 50))")

    def evaluate(self, script: str):
        """Return the value of an expression in the page; a promise is awaited."""
        found = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def mouse(self, x: float, y: float) -> None:
        """Move the mouse there, in pixels of the window."""
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, file: Path, *, whole: bool = True) -> None:
        """Write a PNG of the page, or of the window alone."""
        data = self._call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        file.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """End Chromium."""
        self._session = None
        self._call("Browser.close")
        self._process.wait(timeout=20)
        self._stream.close()
        os.close(self._out)

    def _call(self, method: str, **parameters):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._take()).get("id") != number:
            pass
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def _take(self) -> dict:
        """Return the next message; notes what events say."""
        received = bytearray()
        while (byte := self._stream.read(1)) not in (b"\0", b""):
            received += byte
        assert received, "Chromium ended"
        message = json.loads(received)
        parameters = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Runtime.exceptionThrown":
                self.problems.append(str(parameters["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if parameters["type"] == "error":
                self.problems.append(str(parameters["args"]))
            case "Log.entryAdded" if parameters["entry"]["level"] == "error":
                self.problems.append(parameters["entry"]["text"])
            case "Network.loadingFailed":
                self.problems.append(parameters["errorText"])
        return message
