"""Downloads of weights from a local server, and what goes wrong with them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from toy_weights import CONTENT, cached, isolate, known_file, one_line, register

from frontends import weights
from frontends.base import WeightsError
from frontends.weights import Origin, fetch, load_state_dict, verify


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(tmp_path, monkeypatch)


@dataclass
class Server:
    """A local HTTP server; `behaviour` says what it does with the next request."""

    url: str = ""
    behaviour: str = "whole"
    requests: list[str] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None: ...

        def do_GET(self) -> None:
            state.requests.append(self.path)
            if state.behaviour == "moved" and self.path != "/new/toy.pth":
                self.send_response(302)
                self.send_header("Location", "/new/toy.pth")
                self.end_headers()
                return
            if state.behaviour == "absent":
                self.send_error(404)
                return
            self.send_response(200)
            if state.behaviour not in ("no length", "endless"):
                self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.send_body()

        def send_body(self) -> None:
            match state.behaviour:
                case "wrong":
                    self.wfile.write(CONTENT[:-1] + b"?")
                case "truncated" | "no length, truncated":
                    self.wfile.write(CONTENT[:100])
                case "stall":
                    self.wfile.write(CONTENT[:100])
                    state.released.wait(20)
                case "drip":
                    for start in range(len(CONTENT)):
                        if state.released.wait(0.02):
                            return
                        self.wfile.write(CONTENT[start : start + 1])
                case "endless":
                    self.wfile.write(CONTENT + b"x" * 100)
                case _:
                    self.wfile.write(CONTENT)

    http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{http_server.server_port}/toy.pth"
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield state
    state.released.set()
    http_server.shutdown()
    http_server.server_close()
    thread.join(5)


@pytest.mark.parametrize("behaviour", ["whole", "no length", "moved"])
def test_a_download_lands_verified_in_the_cache(
    behaviour: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register(monkeypatch, known_file(url=server.url))
    server.behaviour = behaviour
    state_dict, file = load_state_dict("toy")
    assert torch.equal(state_dict["layer.bias"], torch.tensor([1.0, -2.0]))
    assert (file.origin, file.path, file.is_verified) == (Origin.DOWNLOAD, cached(tmp_path), True)
    assert server.url in capsys.readouterr().err
    num_requests = len(server.requests)
    assert load_state_dict("toy")[1].origin is Origin.CACHE
    assert fetch("toy").origin is Origin.CACHE and verify("toy").path == cached(tmp_path)
    assert len(server.requests) == num_requests
    assert [path.name for path in cached(tmp_path).parent.iterdir()] == ["toy.pth"]


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("wrong", "SHA-256"),
        ("truncated", f"ended after 100 of {len(CONTENT)} bytes"),
        ("absent", "HTTP 404"),
        ("endless", f"more than the expected {len(CONTENT)} bytes"),
        ("stall", "timed out"),
        ("drip", "not complete after 0.4 s"),
    ],
)
def test_a_failed_download_is_one_line_and_leaves_nothing(
    behaviour: str, message: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, known_file(url=server.url))
    monkeypatch.setattr(weights, "download", functools.partial(weights.download, timeout_s=0.3, limit_s=0.4))
    server.behaviour = behaviour
    for call in (load_state_dict, fetch):
        with pytest.raises(WeightsError) as error:
            call("toy")
        one_line(error, "toy.pth", message, server.url, "vo weights fetch toy", "set LIGHTVO_WEIGHTS")
    assert not cached(tmp_path).parent.exists()


def test_no_network_is_one_line(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, known_file(url="http://127.0.0.1:1/toy.pth"))
    with pytest.raises(WeightsError) as error:
        fetch("toy")
    one_line(error, "toy.pth", "refused", "vo weights fetch toy")
    register(monkeypatch, known_file(url="http://no-such-host.invalid/toy.pth"))
    with pytest.raises(WeightsError) as error:
        fetch("toy")
    one_line(error, "no-such-host.invalid", "vo weights fetch toy")


def test_fetch_replaces_a_damaged_file_in_the_cache(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, known_file(url=server.url))
    cached(tmp_path).parent.mkdir(parents=True)
    cached(tmp_path).write_bytes(b"half a file")
    assert fetch("toy").origin is Origin.DOWNLOAD
    assert cached(tmp_path).read_bytes() == CONTENT


def test_a_cache_that_cannot_be_written_is_one_line(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, known_file(url=server.url))
    (tmp_path / "cache").write_text("a file where the directory should be")
    with pytest.raises(WeightsError) as error:
        fetch("toy")
    one_line(error, "toy.pth", "cannot be written", "XDG_CACHE_HOME")


def test_downloads_at_the_same_time_do_not_disturb_each_other(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, known_file(url=server.url))
    with ThreadPoolExecutor(6) as pool:
        loaded = [pool.submit(load_state_dict, "toy") for _ in range(6)]
    assert all(future.result()[0].keys() == {"layer.weight", "layer.bias"} for future in loaded)
    assert [path.name for path in cached(tmp_path).parent.iterdir()] == ["toy.pth"]


def test_a_terminal_gets_a_progress_bar(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    register(monkeypatch, known_file(url=server.url))
    fetch("toy")
    shown = capsys.readouterr().err
    assert "toy.pth" in shown and "━" in shown and server.url not in shown
