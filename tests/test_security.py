"""Who has no key, or the wrong one, or only a recording of somebody's handshake, gets nothing from a publisher."""

from __future__ import annotations

import dataclasses
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
import zmq.auth
from wire_runs import (
    ANY_PORT,
    PATIENCE_S,
    a_pose,
    a_publisher,
    nothing_left_behind,
    received,
    sequences,
    wait_until,
    wait_until_heard,
)

from vo.cli import main
from vo.client import Client, NoAnswerError
from vo.endpoints import request_endpoint
from vo.keys import (
    ClientKeys,
    KeyPair,
    load_client_keys,
    load_server_keys,
    read_public_key,
    write_client_keys,
    zap_reply,
)
from vo.messages import Request, RequestKind, Topic, encode_request
from vo.publisher import Publisher
from vo.types import ConfigError

TOPICS = (Topic.POSE, Topic.STATUS)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    assert main(["keys", str(tmp_path / "keys"), "--client", "robot", "--client", "desk"]) == 0
    return tmp_path / "keys"


@pytest.fixture
def publisher(keys: Path) -> Iterator[Publisher]:
    """A run that demands keys and has something to say."""
    with nothing_left_behind(), a_publisher(dataclasses.replace(ANY_PORT, keys=str(keys))) as publisher:
        for index in range(20):
            publisher.stream.publish_pose(a_pose(index))
        yield publisher


def keys_of(keys: Path, name: str = "robot") -> ClientKeys:
    loaded = load_client_keys(keys / f"{name}.key_secret", keys / "server.key")
    assert loaded is not None
    return loaded


def stranger_keys(keys: Path) -> ClientKeys:
    """A valid pair that nobody has listed."""
    public, secret = zmq.curve_keypair()
    return ClientKeys(KeyPair(public, secret), read_public_key(keys / "server.key"))


# --- the files ---


def test_keys_are_private_and_never_overwritten(keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {path: path.read_bytes() for path in sorted(keys.rglob("*")) if path.is_file()}
    assert {str(path.relative_to(keys)) for path in files} == {
        "server.key",
        "server.key_secret",
        "robot.key_secret",
        "desk.key_secret",
        "clients/robot.key",
        "clients/desk.key",
    }
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    capsys.readouterr()
    assert main(["keys", str(keys)]) == 2 and "--client NAME" in capsys.readouterr().err
    assert main(["keys", str(keys), "--client", "robot"]) == 2 and "not overwritten" in capsys.readouterr().err
    assert main(["keys", str(keys), "--client", "third"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert all(path.read_bytes() == content for path, content in files.items())
    for name in ("../robot", "a/b", "", "server", "-x"):
        with pytest.raises(ConfigError, match="expected letters"):
            write_client_keys(keys, name, KeyPair(b"", b""))


def test_keys_are_certificates_as_zeromq_knows_them(keys: Path) -> None:
    """pyzmq's own reader gets the same out of them; the public key belongs to the secret one."""
    loaded = load_server_keys(keys)
    public, secret = zmq.auth.load_certificate(keys / "server.key_secret")
    assert (public, secret) == (loaded.own.public, loaded.own.secret)
    assert zmq.curve_public(loaded.own.secret) == loaded.own.public == zmq.auth.load_certificate(keys / "server.key")[0]
    assert loaded.allowed == {keys_of(keys, name).own.public for name in ("robot", "desk")}
    assert loaded.own.secret.decode() not in repr(loaded) + repr(keys_of(keys).own)


def test_files_that_cannot_be_used_are_one_clear_line(keys: Path, tmp_path: Path) -> None:
    secret, server = keys / "robot.key_secret", keys / "server.key"
    for key, server_key, complaint in (
        (secret, None, "--server-key server.key is missing"),
        (None, server, "--key NAME.key_secret is missing"),
        (tmp_path / "none", server, "cannot be read"),
        (server, server, "holds no secret key"),
        (secret, tmp_path, "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            load_client_keys(key, server_key)
    secret.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_client_keys(secret, server)
    damaged = tmp_path / "damaged.key"
    for text in ('public-key = "short"', f'public-key = "{"~" * 40}"', "", "\xff"):
        damaged.write_text(text, encoding="latin-1")
        with pytest.raises(ConfigError, match=str(damaged)):
            read_public_key(damaged)
    with pytest.raises(ConfigError, match="vo keys"):
        load_server_keys(tmp_path)
    assert load_client_keys(None, None) is None


def test_the_judge_lets_in_listed_keys_only() -> None:
    question = [b"1.0", b"7", b"lightvo", b"127.0.0.1", b"", b"CURVE", bytes(32)]
    assert zap_reply(question, {b"key"}, b"key")[:3] == [b"1.0", b"7", b"200"]
    assert zap_reply(question, {b"key"}, b"other")[2] == zap_reply(question, set(), b"key")[2] == b"400"
    for place, wrong in ((0, b"2.0"), (2, b"global"), (5, b"NULL"), (5, b"PLAIN")):
        assert zap_reply([*question[:place], wrong, *question[place + 1 :]], {b"key"}, b"key")[2] == b"400"


# --- addresses ---


def test_wider_addresses_need_keys(keys: Path) -> None:
    wide = dataclasses.replace(ANY_PORT, endpoint="tcp://0.0.0.0:*")
    with pytest.raises(ConfigError, match=r"vo keys DIR.*--keys DIR") as caught:
        a_publisher(wide)
    assert "\n" not in str(caught.value)
    with a_publisher(dataclasses.replace(wide, keys=str(keys))) as publisher:
        publisher.stream.publish_pose(a_pose(0))
        endpoint = f"tcp://127.0.0.1:{publisher.endpoint.rsplit(':', 1)[1]}"
        with Client(endpoint, keys=keys_of(keys)) as client:
            assert sequences(received(client, 1)) == [0]
    with pytest.raises(ConfigError, match="cannot be read"):
        a_publisher(dataclasses.replace(wide, keys=str(keys / "elsewhere")))


# --- who gets what ---


def test_the_right_key_gets_everything(publisher: Publisher, keys: Path) -> None:
    stop = threading.Event()
    publisher.on_stop = stop.set
    for name in ("robot", "desk"):
        with Client(publisher.endpoint, keys=keys_of(keys, name)) as client:
            assert sequences(received(client, 20)) == list(range(20))
            wait_until_heard(client)
            client.ping(PATIENCE_S)
            assert client.connection_problem is None
    with Client(publisher.endpoint, keys=keys_of(keys)) as client:
        client.stop(PATIENCE_S)
    assert stop.is_set()


@pytest.mark.parametrize("who", ["wrong key", "no key", "wrong server"])
def test_others_get_nothing(publisher: Publisher, keys: Path, who: str) -> None:
    """Not by subscription and not as an answer, while one with the right key gets both."""
    theirs = {
        "wrong key": stranger_keys(keys),
        "no key": None,
        "wrong server": ClientKeys(keys_of(keys).own, read_public_key(keys / "clients" / "robot.key")),
    }[who]
    with (
        Client(publisher.endpoint, TOPICS, keys=theirs) as bad,
        Client(publisher.endpoint, TOPICS, keys=keys_of(keys)) as good,
    ):
        num_answers = publisher._num_answers
        wait_until_heard(good)
        good.ping(PATIENCE_S)
        with pytest.raises(NoAnswerError):
            bad.ping(0.5)
        assert bad.receive(0.5) is None
        assert len(received(good, 40)) == 40
        assert bad.receive(0) is None
        assert bad.session_id is None and bad.inbox.last_heard_s is None and bad.inbox.num_malformed == 0
        wait_until(lambda: bad.connection_problem is not None, lambda: bad.receive(0.01))
        assert publisher._num_answers > num_answers and publisher.num_refused == 0
        if who == "wrong key":
            assert "does not let this key in" in str(bad.connection_problem)


def test_another_mechanism_gets_nothing(publisher: Publisher, keys: Path) -> None:
    """PLAIN with whatever name, against a server of CURVE."""
    context = zmq.Context()
    plain = [context.socket(kind) for kind in (zmq.SUB, zmq.DEALER)]
    try:
        for sock, endpoint in zip(plain, (publisher.endpoint, request_endpoint(publisher.endpoint)), strict=True):
            sock.plain_username, sock.plain_password = b"robot", b"robot"
            sock.connect(endpoint)
        plain[0].subscribe(b"")
        plain[1].send(encode_request(Request(RequestKind.SNAPSHOT)), zmq.NOBLOCK)
        with Client(publisher.endpoint, TOPICS, keys=keys_of(keys)) as good:
            received(good, 60)
        assert not any(sock.poll(200) for sock in plain)
    finally:
        context.destroy(linger=0)


def test_a_client_locked_out_stays_out(keys: Path) -> None:
    (keys / "clients" / "desk.key").unlink()
    with (
        a_publisher(dataclasses.replace(ANY_PORT, keys=str(keys))) as publisher,
        Client(publisher.endpoint, keys=keys_of(keys, "desk")) as gone,
        Client(publisher.endpoint, keys=keys_of(keys, "robot")) as good,
    ):
        wait_until_heard(good)
        wait_until(lambda: gone.connection_problem is not None, lambda: gone.receive(0.01))
        assert gone.inbox.last_heard_s is None


def test_keys_against_a_publisher_without_any_get_nothing_either(keys: Path) -> None:
    """Whoever gives keys must not be served by somebody who cannot prove who he is."""
    with a_publisher() as publisher, Client(publisher.endpoint, keys=keys_of(keys)) as client:
        assert client.receive(0.5) is None and client.inbox.last_heard_s is None
        assert client.connection_problem is not None


class Tap:
    """A TCP proxy in front of one port that notes what passes in both directions."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.sent, self.received = bytearray(), bytearray()
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        try:
            near, _ = self._listener.accept()
        except OSError:
            return
        far = socket.create_connection(("127.0.0.1", self._target))
        self._sockets += [near, far]
        for source, sink, log in ((near, far, self.sent), (far, near, self.received)):
            thread = threading.Thread(target=self._pump, args=(source, sink, log))
            self._threads.append(thread)
            thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, log: bytearray) -> None:
        try:
            while data := source.recv(65536):
                log += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def close(self) -> None:
        for sock in (self._listener, *self._sockets):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        for thread in self._threads:
            thread.join(PATIENCE_S)
        for sock in (self._listener, *self._sockets):
            sock.close()


def replay(port: int, sent: bytes) -> bytes:
    """Sends recorded bytes to a port, piece by piece as ZeroMQ would; what comes back."""
    answer = bytearray()
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.settimeout(0.3)
        try:
            # Greeting, HELLO, INITIATE and what follows, each after an answer to the one before.
            for piece in (sent[:11], sent[11:64], sent[64 : 64 + 202], sent[64 + 202 :]):
                raw.sendall(piece)
                try:
                    answer += raw.recv(65536)
                except TimeoutError:
                    continue
            while data := raw.recv(65536):
                answer += data
        except (TimeoutError, ConnectionError):
            pass
    return bytes(answer)


def test_a_replayed_handshake_gets_nothing(publisher: Publisher, keys: Path) -> None:
    """The bytes of a client that was let in, sent again: no READY, no message, and no second stop."""
    num_stops: list[float] = []
    publisher.on_stop = lambda: num_stops.append(time.monotonic())
    port = int(publisher.endpoint.rsplit(":", 1)[1])
    theirs = keys_of(keys)
    context = zmq.Context()
    taps = [Tap(port), Tap(port + 1)]
    sockets = [context.socket(kind) for kind in (zmq.SUB, zmq.DEALER)]
    try:
        for sock, tap in zip(sockets, taps, strict=True):
            sock.curve_publickey, sock.curve_secretkey = theirs.own.public, theirs.own.secret
            sock.curve_serverkey = theirs.server
            sock.connect(f"tcp://127.0.0.1:{tap.port}")
        sockets[0].subscribe(b"")
        sockets[1].send(encode_request(Request(RequestKind.STOP)))
        assert all(sock.poll(PATIENCE_S * 1000) for sock in sockets)
    finally:
        context.destroy(linger=0)
        for tap in taps:
            tap.close()
    assert len(num_stops) == 1
    for tap, tapped_port in zip(taps, (port, port + 1), strict=True):
        sent = bytes(tap.sent)
        assert all(command in sent for command in (b"CURVE", b"\x05HELLO", b"\x08INITIATE", b"\x07MESSAGE"))
        assert all(command in tap.received for command in (b"\x07WELCOME", b"\x05READY", b"\x07MESSAGE"))
        answer = replay(tapped_port, sent)
        assert b"\x07WELCOME" in answer, "the replay must come as far as it can"
        assert b"\x05READY" not in answer and b"\x07MESSAGE" not in answer
    assert len(num_stops) == 1
    with Client(publisher.endpoint, keys=theirs) as client:
        assert sequences(received(client, 20)) == list(range(20)), "the publisher has come to no harm"


def test_rubbish_before_the_handshake_does_no_harm(publisher: Publisher, keys: Path) -> None:
    port = int(publisher.endpoint.rsplit(":", 1)[1])
    for target in (port, port + 1):
        for data in (b"", os.urandom(64), b"\xff" + bytes(8) + b"\x7f\x03\x01" + os.urandom(300)):
            with socket.create_connection(("127.0.0.1", target)) as raw:
                raw.sendall(data)
    with Client(publisher.endpoint, keys=keys_of(keys)) as client:
        assert sequences(received(client, 20)) == list(range(20))
