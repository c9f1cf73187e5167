"""A run in progress: the server, what it answers, and to whom."""

import http.client
import json
import threading

import pytest

from report.made_files import make_evaluation, make_run
from report.test_page import policy_of
from tokenratio.errors import TokenRatioError
from tokenratio.report.live import LiveReport, make_server, watch


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "mine", steps=20, held_out=False)


@pytest.fixture
def served(run):
    """The port of a server of the run."""
    with make_server([str(run)], 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def get(port, path="/", host=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body


def version_of(page):
    start = page.index('id="data-version">') + len('id="data-version">')
    return json.loads(page[start : page.index("</script>", start)])


def test_the_page_follows_the_run(run, served):
    status, page = get(served)
    assert status == 200
    assert policy_of(page)["connect-src"] == ["'self'"]
    seen = version_of(page)
    assert get(served, f"/state?version={seen}") == (204, "")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "loss": 0.123, "rewards/margins": 0.5}\n')
    status, state = get(served, f"/state?version={seen}")
    assert status == 200
    state = json.loads(state)
    assert state["version"] != seen
    (loss,) = [figure for figure in state["figures"] if figure["name"] == "loss"]
    assert loss["data"][0]["x"][-1] == 21
    assert "21 steps" in state["body"]
    assert "<script" not in state["body"]
    assert get(served, f"/state?version={state['version']}")[0] == 204


def test_evaluations_are_seen_wherever_the_report_looks(tmp_path, monkeypatch):
    """In the working directory, and in the folder of a single policy."""
    run = make_run(tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    live = LiveReport([str(run)])
    before = live.version()
    folder = make_evaluation(tmp_path / "evaluation", {"policy": (run, 0.5)})
    assert live.version() != before
    live = LiveReport([str(folder / "policy")])
    before = live.version()
    with (folder / "policy" / "measures.json").open("a") as file:
        file.write("\n")
    assert live.version() != before


def test_only_this_machine_is_answered_under_its_own_name(served):
    for host in ("evil.example", f"evil.example:{served}", "127.0.0.1", f"127.0.0.1:{served + 1}"):
        for path in ("/", "/state"):
            assert get(served, path, host) == (403, "open the printed address")
    assert get(served, "/", f"localhost:{served}")[0] == 200


def test_nothing_else_is_served(served):
    for path in ("/metrics.jsonl", "/../run.json", "/state/", "/%2e%2e/run.json"):
        assert get(served, path)[0] == 404


def test_what_goes_wrong_later_is_told_to_the_reader(run, served):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('broken\n{"step": 22, "loss": 0.1}\n')
    status, text = get(served, "/state?version=old")
    assert status == 503
    assert "metrics.jsonl:21: not JSON" in text


def test_a_port_that_is_taken_is_refused(run, served):
    with pytest.raises(TokenRatioError, match=f"port {served} cannot be used .*another --port"):
        make_server([str(run)], served)


def test_folders_are_checked_before_anything_is_served(tmp_path):
    with pytest.raises(TokenRatioError, match="does not exist"):
        watch([str(tmp_path / "none")], 0)


def test_ctrl_c_ends_it(run, monkeypatch):
    from http.server import ThreadingHTTPServer

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", interrupted)
    said = []
    watch([str(run)], 0, report=said.append)
    assert said[0].startswith("watching: http://127.0.0.1:")
    assert said[1] == "ended"
