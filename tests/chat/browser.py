"""A headless Chromium, driven over the W3C WebDriver protocol (https://www.w3.org/TR/webdriver2) by Debian's chromedriver.

with Browser(folder_for_downloads) as browser:
    browser.open("http://127.0.0.1:8000/")
    browser.type("#question", "甘草\\n")
    browser.wait("document.querySelector('.answer').textContent")
"""

import json
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

DRIVER = shutil.which("chromedriver")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
MISSING = (
    "" if DRIVER and CHROMIUM else "needs chromium and chromedriver: apt-get install chromium chromium-driver"
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's own name for a reference to an element
KEYS = {"Escape": "\ue00c", "Enter": "\ue007", "Tab": "\ue004"}


class Browser:
    def __init__(self, downloads: Path):
        self.downloads = downloads
        self.driver = subprocess.Popen(
            [DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        for line in self.driver.stdout:
            if found := re.search(r"successfully on port (\d+)", line):
                break
        self.address = f"http://127.0.0.1:{found[1]}/session"
        arguments = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage".split()
        arguments += ["--window-size=1200,820", "--lang=en-US", "--accept-lang=en-US"]
        preferences = {"download.default_directory": str(downloads)}
        options = {"binary": CHROMIUM, "args": arguments, "prefs": preferences}
        wanted = {"alwaysMatch": {"goog:chromeOptions": options, "unhandledPromptBehavior": "ignore"}}
        self.address += "/" + self._call("POST", "", {"capabilities": wanted})["sessionId"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._call("DELETE", "")
        self.driver.terminate()
        self.driver.wait(180)
        self.driver.stdout.close()

    def _call(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.address + path, data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=180) as answer:
            return json.load(answer)["value"]

    def open(self, address: str) -> None:
        self._call("POST", "/url", {"url": address})

    def run(self, script: str, *arguments):
        """What a script returns in the page."""
        return self._call("POST", "/execute/sync", {"script": script, "args": arguments})

    def wait(self, expression: str, seconds: float = 180):
        """The value of an expression in the page, as soon as it is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(f"return {expression}")):
            assert time.monotonic() < deadline, f"{expression} is {value!r}:\n{self.text('body')}"
            time.sleep(0.03)
        return value

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0])?.innerText", selector)

    def type(self, selector: str, text: str) -> None:
        self._call("POST", f"/element/{self._find(selector)}/value", {"text": text})

    def press(self, key: str) -> None:
        """A key, for whatever has the focus."""
        actions = [{"type": kind, "value": KEYS[key]} for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def click(self, selector: str) -> None:
        self._call("POST", f"/element/{self._find(selector)}/click", {})

    def _find(self, selector):
        return self._call("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._emulate("setDeviceMetricsOverride", size)

    def speak(self, language: str) -> None:
        agent = self.run("return navigator.userAgent")
        self._emulate("setUserAgentOverride", {"userAgent": agent, "acceptLanguage": language})

    def _emulate(self, command, how):
        self._call("POST", "/goog/cdp/execute", {"cmd": f"Emulation.{command}", "params": how})
