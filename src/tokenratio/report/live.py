"""A run in progress in the browser: the report, rendered again whenever the run's files change."""

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.options import REFERENCE
from tokenratio.evaluation.results import MEASURES_FILE
from tokenratio.names import split_name
from tokenratio.report.page import render_part
from tokenratio.report.run_report import build_report, page_data, report_page
from tokenratio.run_folder import EVAL_FILE, METRICS_FILE, RUN_FILE

HOST = "127.0.0.1"  # never another: the report holds the run's data
_BODY = "report_body.html.j2"


class LiveReport:
    """The newest report on folders whose files change.

    Args:
        runs: as `write_report` takes them.
    """

    def __init__(self, runs: Sequence[str]) -> None:
        self._runs = runs
        self._lock = threading.Lock()
        self._version, self._state = "", b""

    def page(self) -> bytes:
        """The whole page."""
        version = self.version()
        return report_page(build_report(self._runs), live=version).encode()

    def state(self, seen: str) -> bytes | None:
        """What changes in the page, as JSON; None if the reader has seen the newest."""
        with self._lock:
            version = self.version()
            if version == seen:
                return None
            if version != self._version:
                report = build_report(self._runs)
                state = {"version": version, "body": render_part(_BODY, report=report)}
                self._state = json.dumps(state | page_data(report)).encode()
                self._version = version
            return self._state

    def version(self) -> str:
        """A digest of the sizes and times of the files that the report is made from."""
        digest = hashlib.sha256()
        for given in self._runs:
            folder = Path(split_name(given)[1])
            paths = [folder / name for name in (RUN_FILE, METRICS_FILE, EVAL_FILE)]
            beside = folder.resolve().parent
            # As `read_artefacts` looks for evaluations; a policy's folder stands by its reference.
            paths += [folder / MEASURES_FILE, beside / REFERENCE / MEASURES_FILE]
            places = [place / "evaluation" for place in (folder, beside, Path.cwd())]
            for place in (folder, *places):
                paths += sorted(place.glob(f"*/{MEASURES_FILE}"))
            for path in paths:
                if path.is_file():
                    status = path.stat()
                    line = f"{path} {status.st_mtime_ns} {status.st_size}\n"
                    digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]


def make_server(runs: Sequence[str], port: int) -> ThreadingHTTPServer:
    """A server of the live report on this machine alone; port 0 takes a free one.

    Raises:
        TokenRatioError: the port is taken.
    """
    live = LiveReport(runs)

    class Handler(BaseHTTPRequestHandler):
        """Answers the page and its changes, and only to a browser that was sent here by name."""

        def do_GET(self) -> None:
            port = server.server_port
            # Another site's name may resolve to this machine (DNS rebinding).
            if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
                self._answer(HTTPStatus.FORBIDDEN, b"open the printed address")
                return
            url = urlsplit(self.path)
            try:
                if url.path == "/":
                    self._answer(HTTPStatus.OK, live.page(), "text/html; charset=utf-8")
                elif url.path == "/state":
                    seen = parse_qs(url.query).get("version", [""])[0]
                    state = live.state(seen)
                    if state is None:
                        self._answer(HTTPStatus.NO_CONTENT)
                    else:
                        self._answer(HTTPStatus.OK, state, "application/json")
                else:
                    self._answer(HTTPStatus.NOT_FOUND, b"not found")
            except TokenRatioError as error:
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, str(error).encode())
            except (BrokenPipeError, ConnectionResetError):
                pass  # the reader has gone

        def _answer(self, status: HTTPStatus, body: bytes = b"", kind: str = "text/plain") -> None:
            self.send_response(status)
            if status != HTTPStatus.NO_CONTENT:
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("X-Frame-Options", "DENY")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Say nothing: there is a request every other second."""

    try:
        server = ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise TokenRatioError(
            f"port {port} cannot be used ({error.strerror}): choose another --port"
        ) from None
    return server


def watch(runs: Sequence[str], port: int, *, report: Callable[[str], None] = print) -> None:
    """Serve the live report until Ctrl-C.

    Raises:
        TokenRatioError: see `write_report` and `make_server`.
    """
    build_report(runs)  # what is wrong with the folders is said before a browser is opened
    with make_server(runs, port) as server:
        report(f"watching: http://{HOST}:{server.server_port}/ (Ctrl-C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            report("ended")
