"""A doctor's screen: OHIF as npm ships it, served with Orthanc's DICOMweb under one origin, in headless Chromium.

The browser is driven by the DevTools protocol over a pair of pipes, which needs no port and no further package.
"""

import fcntl
import http.client
import json
import os
import subprocess
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

_ROOT = Path(__file__).parents[3]
_OHIF = _ROOT / ".viewer" / "package" / "dist"
_PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
_ANSWER_S = 60.0
_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--remote-debugging-pipe",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
    "--lang=en-US",
    "--window-size=1600,1000",
)


@pytest.fixture(scope="session")
def ohif() -> Path:
    """The built viewer; missing is a failure in CI and a skip elsewhere, as with any other peer."""
    if not (_OHIF / "index.html").is_file() or not _PLUGIN.exists():
        message = "the viewer is not installed: run `make peers` (apt: chromium, orthanc-dicomweb, npm; then OHIF)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return _OHIF


class _SameOrigin(SimpleHTTPRequestHandler):
    """The viewer's files, its settings, and everything under /dicom-web from Orthanc."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, archive: Any, **more: Any) -> None:
        self.archive = archive
        super().__init__(*args, **more)

    def do_GET(self) -> None:
        if self.path.startswith("/dicom-web"):
            self._pass_on(None)
        elif self.path == "/app-config.js":
            self._answer(HTTPStatus.OK, "text/javascript", _viewer_settings())
        else:
            # A path of the viewer's own router is no file: the page itself answers it.
            if not Path(self.translate_path(self.path)).is_file():
                self.path = "/index.html"
            super().do_GET()

    def do_POST(self) -> None:
        self._pass_on(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def log_message(self, *_: Any) -> None:
        """Keep the test's output free of one line for each request."""

    def _pass_on(self, body: bytes | None) -> None:
        with closing(http.client.HTTPConnection(self.archive.host, self.archive.http_port, timeout=30)) as connection:
            # The host as the browser sees it: Orthanc builds the links of its answers from it.
            headers = {name: self.headers[name] for name in ("Accept", "Content-Type", "Host") if name in self.headers}
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            self._answer(response.status, response.getheader("Content-Type", ""), response.read())

    def _answer(self, status: int, content_type: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _viewer_settings() -> bytes:
    source = {
        "namespace": "@ohif/extension-default.dataSourcesModule.dicomweb",
        "sourceName": "archive",
        "configuration": {
            "friendlyName": "archive",
            "name": "archive",
            "wadoUriRoot": "/dicom-web",
            "qidoRoot": "/dicom-web",
            "wadoRoot": "/dicom-web",
            "qidoSupportsIncludeField": False,
            "imageRendering": "wadors",
            "thumbnailRendering": "wadors",
            "enableStudyLazyLoad": True,
            "supportsFuzzyMatching": False,
            "supportsWildcard": True,
            "omitQuotationForMultipartRequest": True,
            "bulkDataURI": {"enabled": True, "relativeResolution": "studies"},
        },
    }
    settings = {
        "routerBasename": None,
        "extensions": [],
        "modes": [],
        "customizationService": {},
        "showStudyList": True,
        "maxNumberOfWebWorkers": 1,
        "showCPUFallbackMessage": False,
        "showWarningMessageForCrossOrigin": False,
        "investigationalUseDialog": {"option": "never"},
        "maxNumRequests": {"interaction": 10, "thumbnail": 2, "prefetch": 2},
        "defaultDataSourceName": "archive",
        "dataSources": [source],
    }
    return f"window.config = {json.dumps(settings)};".encode()


@dataclass
class Browser:
    """One page of a headless Chromium."""

    process: subprocess.Popen[bytes]
    to_browser: int
    from_browser: int
    session: str = ""
    told: list[str] = field(default_factory=list)
    _count: int = 0
    _pending: bytes = b""

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command of the DevTools protocol and return its result; what else is said meanwhile is kept."""
        self._count += 1
        number = self._count
        command = {"id": number, "method": method, "params": params}
        if self.session:
            command["sessionId"] = self.session
        os.write(self.to_browser, json.dumps(command).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return dict(message["result"])
            if message.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                self.told.append(json.dumps(message["params"])[:600])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._pending:
            part = os.read(self.from_browser, 1 << 20)
            if not part:
                raise RuntimeError("the browser ended")
            self._pending += part
        message, _, self._pending = self._pending.partition(b"\0")
        return dict(json.loads(message))

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:800])
        return answer["result"].get("value")

    def text(self) -> str:
        """Return what the page says in words."""
        return str(self.evaluate("document.body ? document.body.innerText : ''"))

    def wait(self, expression: str, what: str) -> Any:
        """Wait until an expression is true in the page, and return it."""
        return self.until(lambda: self.evaluate(expression), bool, what)

    def until(self, look: Callable[[], Any], good: Callable[[Any], Any], what: str) -> Any:
        """Look until what is seen is good, and return it."""
        deadline = time.monotonic() + _ANSWER_S
        pause = threading.Event()
        while True:
            value = look()
            if good(value):
                return value
            if time.monotonic() > deadline:
                pytest.fail(
                    f"{what}: not within {_ANSWER_S:.0f} s\n{self.text()[-2000:]}\n" + "\n".join(self.told[-9:])
                )
            pause.wait(0.1)

    def double_click(self, x: float, y: float) -> None:
        at = {"x": x, "y": y, "button": "left"}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for count in (1, 2):
            self.call("Input.dispatchMouseEvent", type="mousePressed", clickCount=count, **at)
            self.call("Input.dispatchMouseEvent", type="mouseReleased", clickCount=count, **at)

    def screenshot(self, path: Path) -> NDArray[np.uint8]:
        """Write what is on the screen to `path` and return it: (rows, columns, 3), uint8."""
        png = b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        path.write_bytes(png)
        return np.asarray(Image.open(BytesIO(png)).convert("RGB"))


@pytest.fixture(scope="session")
def browser(peer: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One Chromium for the session."""
    program = peer("/usr/bin/chromium")
    home = tmp_path_factory.mktemp("browser")
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    # Chromium reads descriptor 3 and writes 4. The shell puts them there; above 9 neither can be overwritten first.
    high = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (theirs_in, theirs_out)]
    with (home / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            [
                "/bin/bash",
                "-c",
                f'exec "$@" 3<&{high[0]} 4>&{high[1]} {high[0]}<&- {high[1]}>&-',
                "chromium",
                str(program),
                *_OPTIONS,
                f"--user-data-dir={home / 'profile'}",
                "about:blank",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=high,
            env={**os.environ, "HOME": str(home)},
            start_new_session=True,
        )
    for end in (theirs_in, theirs_out, *high):
        os.close(end)
    page = Browser(process, ours_out, ours_in)
    try:
        target = next(one for one in page.call("Target.getTargets")["targetInfos"] if one["type"] == "page")
        page.session = page.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        page.call("Emulation.setDeviceMetricsOverride", width=1600, height=1000, deviceScaleFactor=1, mobile=False)
        # As for a doctor who has been here before: without the viewer's tour over the image.
        page.call(
            "Page.addScriptToEvaluateOnNewDocument",
            source="try { localStorage.setItem('shownTours', '[\"basicViewerTour\"]') } catch (_) {}",
        )
        yield page
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(ours_out)
        os.close(ours_in)


@dataclass(frozen=True)
class Viewer:
    """An archive with DICOMweb, and the address of the viewer that shows it."""

    archive: Any
    url: str


@pytest.fixture(scope="session")
def viewer(ohif: Path, start_orthanc: Callable[..., Any]) -> Iterator[Viewer]:
    """OHIF in front of an Orthanc of its own."""
    archive = start_orthanc(ae_title="PACS", Plugins=[str(_PLUGIN)], DicomWeb={"Enable": True})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_SameOrigin, archive=archive, directory=str(ohif)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Viewer(archive, f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    thread.join()
    server.server_close()
