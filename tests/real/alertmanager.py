"""A real Alertmanager on the loopback with a webhook behind it.

Flows in: alerts of a Prometheus. Flows out: what the webhook was told, in order.
"""

import http.client
import json
import subprocess
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from conftest import need
from running import end, free_port

START_SECONDS = 20.0
STOP_SECONDS = 10.0


class Webhook:
    """Takes notifications as Alertmanager's webhook receiver sends them; use it with `with`."""

    def __init__(self) -> None:
        """Listen on a free port; nothing is answered before the context is entered."""
        told: list[dict[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                told.extend(json.loads(body)["alerts"])
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                """Say nothing."""

        self.told = told
        """Each alert of each notification: `status` (firing, resolved), `labels`, `annotations`."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1})
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def wait_for(self, status: str, alert: str, timeout: float) -> dict[str, Any]:
        """Wait until an alert was told with this status. Raises TimeoutError with all that was told."""
        deadline = time.monotonic() + timeout
        while True:
            for told in list(self.told):
                if (told["status"], told["labels"]["alertname"]) == (status, alert):
                    return told
            if time.monotonic() > deadline:
                raise TimeoutError(f"{alert} was not {status} within {timeout} s: {self.told}")
            time.sleep(0.1)

    def __enter__(self) -> Self:
        """Begin to answer."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""
        self._server.shutdown()
        self._thread.join(STOP_SECONDS)
        self._server.server_close()


class Alertmanager:
    """One Alertmanager process that passes everything on to a webhook at once; use it with `with`."""

    def __init__(self, webhook: str) -> None:
        """Describe the process; nothing runs before the context is entered."""
        self.address = f"127.0.0.1:{free_port()}"
        self._home = tempfile.TemporaryDirectory(prefix="alertmanager-")
        self._log = Path(self._home.name) / "log"
        self._process: subprocess.Popen[bytes] | None = None
        quick = {"group_by": ["..."], "group_wait": "0s", "group_interval": "1s", "repeat_interval": "1h"}
        receiver = {"name": "webhook", "webhook_configs": [{"url": webhook, "send_resolved": True}]}
        config = {"route": {"receiver": "webhook", **quick}, "receivers": [receiver]}
        (Path(self._home.name) / "config.yml").write_text(yaml.safe_dump(config))

    def __enter__(self) -> Self:
        """Start and wait until it is ready. Raises RuntimeError with its log where it does not get there in time."""
        home = self._home.name
        command = [need("alertmanager"), f"--config.file={home}/config.yml", f"--storage.path={home}/data"]
        command += [f"--web.listen-address={self.address}", "--cluster.listen-address=", "--log.level=warn"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + START_SECONDS
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = self._log.read_text()
                self._stop()
                raise RuntimeError(f"Alertmanager did not start on {self.address}: {said}")
            time.sleep(0.05)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self._stop()

    def _ready(self) -> bool:
        connection = http.client.HTTPConnection(self.address, timeout=5)
        try:
            connection.request("GET", "/-/ready")
            return connection.getresponse().status == http.HTTPStatus.OK
        except OSError:
            return False
        finally:
            connection.close()

    def _stop(self) -> None:
        """End the process (our own child only) and remove its storage."""
        if self._process:
            end(self._process)
        self._home.cleanup()
