"""A headless Chromium for the tests of pages, by chromedriver's WebDriver protocol (W3C) over HTTP, and its installation.

    python tests/browser/driver.py install

Leaves out: other browsers, waiting for pages that change by themselves.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

PACKAGES = ("chromium", "chromium-driver")
INSTALL = ("apt-get", "install", "--yes", "--no-install-recommends", *PACKAGES)
FLAGS = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "disable-dev-shm-usage", "hide-scrollbars"]  # no-sandbox: root has none
FLAGS += [
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
]  # nothing of its own over the network
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
ENTER = "\ue007"


def missing() -> bool:
    return not (shutil.which("chromium") and shutil.which("chromedriver"))


class Browser:
    """`with Browser() as browser: browser.open(page, 360)`."""

    def __enter__(self) -> "Browser":
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.process = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        said = next(line for line in self.process.stdout if "started successfully on port" in line)
        self.address = f"http://127.0.0.1:{said.rsplit(' ', 1)[1].strip().rstrip('.')}/session"
        options = {"args": [f"--{flag}" for flag in FLAGS] + [f"--user-data-dir={self.profile.name}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        self.address += f"/{self.ask('', {'capabilities': {'alwaysMatch': wanted}})['sessionId']}"
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.ask("", None, "DELETE")
        finally:
            self.process.terminate()
            self.process.wait()
            self.profile.cleanup()

    def ask(self, path: str, body: dict[str, Any] | None, method: str = "POST") -> Any:
        sent = None if body is None else json.dumps(body).encode()
        with OPENER.open(urllib.request.Request(self.address + path, sent, method=method), timeout=60) as reply:
            return json.load(reply)["value"]

    def devtools(self, command: str, **options: Any) -> Any:
        return self.ask("/goog/cdp/execute", {"cmd": command, "params": options})

    def open(self, page: Path, width: int, scheme: str = "light") -> None:
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600)
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.ask("/url", {"url": page.as_uri()})

    def run(self, script: str, *values: Any) -> Any:
        """What a JavaScript function body returns."""
        return self.ask("/execute/sync", {"script": script, "args": list(values)})

    def click(self, selector: str) -> None:
        (element,) = self.ask("/element", {"using": "css selector", "value": selector}).values()
        self.ask(f"/element/{element}/click", {})

    def press(self, key: str) -> None:
        """On what has the focus."""
        strokes = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self.ask("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]})

    def log(self, kind: str) -> list[dict[str, Any]]:
        """ "browser": the console, "performance": what DevTools says; since it was last asked."""
        return self.ask("/se/log", {"type": kind})

    def screenshot(self, path: Path) -> None:
        """Of the whole page."""
        wide, high = self.run("return [innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": wide, "height": high, "scale": 1}
        path.write_bytes(base64.b64decode(self.devtools("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]))


def install() -> str:
    """Install it where that is ours to do; returns what to tell. Never fails: without a browser its tests are skipped."""
    if not missing():
        return "Chromium is installed"
    if os.getuid() or not shutil.which("apt-get"):
        return f"Chromium is not installed, and its tests are skipped: as root, {' '.join(INSTALL)}"
    done = subprocess.run(INSTALL, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, capture_output=True, text=True)
    if missing():
        return f"Chromium could not be installed, and its tests are skipped: {' '.join(done.stderr.split())}"
    return "Chromium was installed"


if __name__ == "__main__":
    print(install() if sys.argv[1:] == ["install"] else __doc__)
