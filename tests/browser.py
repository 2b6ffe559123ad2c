"""A page in a real headless browser, by the DevTools protocol over a pipe: no driver to install."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
AXE = Path(sys.prefix) / "node_modules" / "axe-core" / "axe.min.js"


def find_browser() -> str:
    """The program of a browser; without one the test is skipped, but fails in CI."""
    return next((path for name in NAMES if (path := shutil.which(name))), None) or _missing("a Chromium")


def find_axe() -> str:
    """The source of axe-core, which finds what people with disabilities could not use; as `find_browser`."""
    return AXE.read_text(encoding="utf-8") if AXE.exists() else _missing("axe-core")


def _missing(what: str) -> str:
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs {what}: make browser")
    raise AssertionError


class Browser:
    """One page of a headless Chromium.

    Attributes:
        complaints: What the console and the browser said that is a warning or worse.
    """

    def __init__(self, program: str) -> None:
        self.complaints: list[str] = []
        self._profile = tempfile.mkdtemp(prefix="agile-browser-")
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]

        def place() -> None:  # the protocol's pipe is the file descriptors 3 and 4
            high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 5) for fd in (commands, answers)]  # free ones: neither may be 3 or 4
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        self._process = subprocess.Popen(
            [program, *flags, "--remote-debugging-pipe", f"--user-data-dir={self._profile}", "about:blank"],
            preexec_fn=place,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._buffer, self._number, self._session = b"", 0, ""
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._send(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)
        shutil.rmtree(self._profile, ignore_errors=True)

    def open(self, page: Path | str, width: int, *, dark: bool = False) -> None:
        """Show a file or an address at this width, in CSS pixels."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._send("Emulation.setEmulatedMedia", features=scheme)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self._send("Emulation.setDeviceMetricsOverride", **size)
        self._send("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        while self.value("document.readyState") != "complete":
            pass

    def type(self, text: str) -> None:
        """Write into what has the focus."""
        self._send("Input.insertText", text=text)

    def press(self, key: str, *, ctrl: bool = False, alt: bool = False) -> None:
        """Press and let go of a key."""
        codes = {"Enter": 13, "Tab": 9}
        pressed: dict[str, Any] = {"key": key, "modifiers": alt + 2 * ctrl}
        pressed["windowsVirtualKeyCode"] = codes.get(key, ord(key[0].upper()))
        pressed["code"] = key if key in codes else f"Key{key.upper()}"
        text = {"Enter": "\r", "Tab": ""}.get(key, key)
        down = {} if ctrl or alt or not text else {"text": text}
        self._send("Input.dispatchKeyEvent", type="keyDown", **pressed, **down)
        self._send("Input.dispatchKeyEvent", type="keyUp", **pressed)

    def value(self, expression: str, *, wait: bool = False) -> Any:
        """What an expression gives in the page, or what its promise comes to."""
        how = {"returnByValue": True, "awaitPromise": wait}
        return self._send("Runtime.evaluate", expression=expression, **how)["result"].get("value")

    def violations(self, axe: str) -> list[str]:
        """What axe-core calls serious or critical in the page: the rule and where it is broken."""
        self.value(f"{axe};0")
        found = self.value(
            """axe.run(document, {resultTypes: ['violations']}).then(r => r.violations
              .filter(v => v.impact === 'serious' || v.impact === 'critical')
              .map(v => `${v.id}: ${v.nodes.map(n => n.target.join(' ')).join(', ')}`))""",
            wait=True,
        )
        assert isinstance(found, list), "axe-core did not run"
        return [str(line) for line in found]

    def picture(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        taken = self._send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))

    def _send(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            said = answer.get("params", {})
            match answer.get("method"):
                case "Log.entryAdded" if said["entry"]["level"] in ("warning", "error"):
                    self.complaints.append(said["entry"]["text"])
                case "Runtime.exceptionThrown":
                    self.complaints.append(said["exceptionDetails"]["text"])
                case "Runtime.consoleAPICalled" if said["type"] in ("warning", "error"):
                    self.complaints.append(str(said["args"]))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not (data := os.read(self._answers, 65536)):
                raise RuntimeError("the browser ended")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\0", 1)
        return dict(json.loads(line))
