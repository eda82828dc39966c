"""The link against a real sshd: bytes arrive as they were sent, ends and errors are told as they are."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import os
import random
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from e2e.private_sshd import DEADLINE, PrivateSshd, kill_session, new_key

from agent.api import SshOptions
from transport import link_errors as errors
from transport.link import Link, socket_pair
from transport.link_errors import LinkError
from transport.process import Bridge, ProcessEnd
from transport.ssh import agent_command, connect, open_bridge, open_link, peer_address
from transport.target import HostTarget, parse_host

T = TypeVar("T")
MIB = 1 << 20
THERE = HostTarget("there")


@pytest.fixture(autouse=True)
def usual_trust(server: PrivateSshd) -> Iterator[None]:
    yield
    server.accept("client_key")
    server.trust("host_key")


def run(work: Awaitable[T]) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(work, 120)

    return asyncio.run(bounded())


async def linked(
    options: SshOptions,
    engine: Callable[[socket.socket], T],
    target: HostTarget = THERE,
    lines: list[str] | None = None,
) -> tuple[T, ProcessEnd, Link]:
    """Run `engine` in a thread on the other end of a link; what it returned, how the link ended, the link."""
    ours, theirs = socket_pair()
    link = await open_link(target, options, ours, (lines if lines is not None else []).append)
    try:
        with theirs:
            result = await asyncio.to_thread(engine, theirs)
    finally:
        end = await link.close()
    return result, end, link


def read_all(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(MIB), b""))


def sent(data: bytes, repeat: int = 1) -> Callable[[socket.socket], bytes]:
    """An engine that sends, closes its direction, and reads the answer to its end."""

    def engine(sock: socket.socket) -> bytes:
        for _ in range(repeat):
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        return read_all(sock)

    return engine


def test_a_large_stream_arrives_intact(server: PrivateSshd) -> None:
    block, repeat = random.Random(1).randbytes(MIB), 300
    answer, end, link = run(linked(server.options("sha256sum"), sent(block, repeat)))
    digest = hashlib.sha256()
    for _ in range(repeat):
        digest.update(block)
    assert answer.split()[0].decode() == digest.hexdigest()
    assert end.clean
    assert link.bytes_sent == repeat * MIB and link.bytes_received == len(answer)


def test_a_large_stream_comes_back_intact(server: PrivateSshd) -> None:
    data = random.Random(2).randbytes(64 * MIB)
    file = server.here / "data"
    file.write_bytes(data)
    answer, end, _ = run(linked(server.options(f"cat {file}"), sent(b"")))
    assert hashlib.sha256(answer).digest() == hashlib.sha256(data).digest()
    assert end.clean


@pytest.mark.parametrize("target", ["there", "behind"])
def test_both_directions_at_once(server: PrivateSshd, target: str) -> None:
    """An echo: who stopped reading while it writes would stand still for ever. Also through a jump host."""
    data = random.Random(3).randbytes(32 * MIB)

    def engine(sock: socket.socket) -> bytes:
        def write() -> None:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

        writer = threading.Thread(target=write)
        writer.start()
        answer = read_all(sock)
        writer.join()
        return answer

    answer, end, _ = run(linked(server.options("cat"), engine, parse_host(target)))
    assert answer == data and end.clean


def test_single_bytes_are_not_held_back(server: PrivateSshd) -> None:
    """Each byte is answered before the next is sent: a link that waited for more would never get on."""

    def engine(sock: socket.socket) -> bytes:
        sock.settimeout(DEADLINE)
        answer = b""
        for byte in b"one by one":
            sock.sendall(bytes([byte]))
            answer += sock.recv(1)
        return answer

    assert run(linked(server.options("cat"), engine))[0] == b"one by one"


def test_the_other_end_can_close_its_direction_alone(server: PrivateSshd) -> None:
    """Both its outputs, that is: sshd tells the end of one only when the other has ended too."""
    file = server.here / "received"

    def engine(sock: socket.socket) -> bytes:
        first = read_all(sock)  # its end of stream, while ours goes on
        sock.sendall(b"after the end")
        sock.shutdown(socket.SHUT_WR)
        return first

    first, end, _ = run(linked(server.options(f"echo hello; exec >&- 2>&-; cat >{file}"), engine))
    assert first == b"hello\n" and end.clean
    assert file.read_bytes() == b"after the end"


def test_end_incoming_is_half_a_close(server: PrivateSshd) -> None:
    file = server.here / "half"

    async def scenario() -> bytes:
        ours, theirs = socket_pair()
        link = await open_link(THERE, server.options(f"cat >{file}"), ours, print)
        link.end_incoming()
        with theirs:
            answer = await asyncio.to_thread(read_all, theirs)
            theirs.sendall(b"still going out")
        assert (await link.close()).clean
        return answer

    assert run(scenario()) == b""
    assert file.read_bytes() == b"still going out"


def test_a_reader_that_sleeps_stops_the_writer(server: PrivateSshd) -> None:
    """What nobody reads stays with the engine: the link takes some megabytes, no more, and loses nothing."""
    go = server.here / "go"
    size = 64 * MIB

    async def scenario() -> bytes:
        ours, theirs = socket_pair()
        script = f"while ! test -e {go}; do sleep 0.05; done; wc -c"
        link = await open_link(THERE, server.options(script), ours, print)
        with theirs:
            writing = asyncio.ensure_future(asyncio.to_thread(sent(bytes(MIB), size // MIB), theirs))
            try:
                await until_still(lambda: link.bytes_sent)
                assert 0 < link.bytes_sent < 16 * MIB and not writing.done()
            finally:
                go.touch()
            answer = await writing
        assert (await link.close()).clean
        return answer

    assert int(run(scenario())) == size


async def until_still(value: Callable[[], int]) -> None:
    """Wait until a number that grows has not changed for half a second."""
    deadline = time.monotonic() + DEADLINE
    seen, since = value(), time.monotonic()
    while time.monotonic() - since < 0.5 or not seen:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
        if value() != seen:
            seen, since = value(), time.monotonic()


@pytest.mark.parametrize(
    ("script", "status", "signal_", "error", "words"),
    [
        ("exit 0", 0, None, errors.AgentFailed, "status 0"),
        ("echo why >&2; exit 7", 7, None, errors.AgentFailed, "status 7: why"),
        ("exec /nonexistent/agent", 127, None, errors.AgentNotFound, "/nonexistent/agent"),
        ("kill -KILL $$", None, "KILL", errors.AgentFailed, "SIGKILL"),
    ],
)
def test_how_the_command_ended_is_known(
    server: PrivateSshd,
    script: str,
    status: int | None,
    signal_: str | None,
    error: type[LinkError],
    words: str,
) -> None:
    answer, end, _ = run(linked(server.options(script), read_all))
    assert answer == b""  # the engine reads the end of the stream
    assert (end.status, end.signal, end.lost) == (status, signal_, None)
    assert type(end.error()) is error and words in str(end.error())


def test_standard_error_comes_as_lines(server: PrivateSshd) -> None:
    lines: list[str] = []
    script = r"printf 'first\nsec' >&2; sleep 0.1; printf 'ond\nünfinished' >&2"
    run(linked(server.options(script), read_all, lines=lines))
    assert lines == ["first", "second", "ünfinished"]


def test_a_connection_that_breaks_is_not_an_end(server: PrivateSshd) -> None:
    def engine(sock: socket.socket) -> bytes:
        kill_session(int(sock.makefile("rb", buffering=0).readline()))
        return read_all(sock)

    answer, end, _ = run(linked(server.options("echo $$; exec sleep 60"), engine))
    assert answer == b""
    assert end.lost is not None and end.status is None
    assert isinstance(end.error(), errors.ConnectionLost)


def test_an_engine_that_is_gone_ends_the_command(server: PrivateSshd) -> None:
    """The destination must notice at once that the source's engine has died."""

    def engine(sock: socket.socket) -> None:
        sock.sendall(b"x" * 100)
        sock.close()

    _, end, _ = run(linked(server.options("cat >/dev/null; exit 5"), engine))
    assert end.status == 5


def test_close_ends_a_command_that_does_not_end(server: PrivateSshd) -> None:
    async def scenario() -> ProcessEnd:
        ours, theirs = socket_pair()
        link = await open_link(THERE, server.options("exec sleep 60"), ours, print)
        theirs.close()
        return await link.close(timeout=0.1)

    end = run(scenario())
    assert end.status is None


def refused(target: str, options: SshOptions) -> LinkError:
    """The error with which no link comes about; the engine's end must read the end of the stream."""

    async def scenario() -> LinkError:
        ours, theirs = socket_pair()
        with theirs:
            with pytest.raises(LinkError) as caught:
                await open_link(parse_host(target), options, ours, print)
            assert await asyncio.to_thread(theirs.recv, 1) == b""
        return caught.value

    return run(scenario())


def test_a_host_nobody_vouches_for_is_refused(server: PrivateSshd) -> None:
    server.trust(None)
    error = refused("there", server.options())
    assert type(error) is errors.HostKeyUnknown
    assert fingerprint(server.here / "host_key.pub") in str(error)


def test_a_host_with_another_key_is_refused(server: PrivateSshd) -> None:
    server.trust("other_key")
    error = refused("there", server.options())
    assert type(error) is errors.HostKeyChanged
    assert fingerprint(server.here / "host_key.pub") in str(error) and "ssh-keygen -R" in str(error)


def test_a_host_with_a_key_of_another_kind_is_refused(server: PrivateSshd, tmp_path: Path) -> None:
    import subprocess

    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-N", "", "-f", str(tmp_path / "key")], check=True)
    line = f"[127.0.0.1]:{server.port} {(tmp_path / 'key.pub').read_text()}"
    (server.here / "known_hosts").write_text(line)
    assert type(refused("there", server.options())) is errors.HostKeyChanged


def test_a_revoked_host_key_is_refused(server: PrivateSshd) -> None:
    key = (server.here / "host_key.pub").read_text()
    (server.here / "known_hosts").write_text(f"[127.0.0.1]:{server.port} {key}@revoked * {key}")
    error = refused("there", server.options())
    assert type(error) is errors.HostKeyRejected and "revoked" in str(error)


def test_no_file_of_known_hosts_is_no_trust_in_everybody(server: PrivateSshd, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(server.config.read_text().replace(f"{server.here}/known_hosts", "none"))
    error = refused("there", SshOptions(config=(str(config),)))
    assert type(error) is errors.HostKeyUnknown


def test_damaged_lines_of_known_hosts_do_not_hide_the_others(server: PrivateSshd) -> None:
    file = server.here / "known_hosts"
    file.write_text("damaged\n@what is this\n" + file.read_text())
    assert run(linked(server.options(), sent(b"hello")))[0] == b"hello"


def test_a_hashed_name_is_found(server: PrivateSshd) -> None:
    import subprocess

    file = server.here / "known_hosts"
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(file)], check=True, capture_output=True)
    assert "127.0.0.1" not in file.read_text()
    assert run(linked(server.options(), sent(b"hello")))[0] == b"hello"


def test_a_key_that_is_not_accepted(server: PrivateSshd) -> None:
    server.accept("other_key")
    error = refused("there", server.options())
    assert type(error) is errors.AuthenticationFailed and "--identity" in str(error)
    other = (str(server.here / "other_key"),)
    assert run(linked(server.options(identity=other), sent(b"hello")))[0] == b"hello"


def test_key_files_that_cannot_be_used(server: PrivateSshd, tmp_path: Path) -> None:
    missing = (str(tmp_path / "missing"),)
    assert type(refused("there", server.options(identity=missing))) is errors.IdentityUnusable
    damaged = tmp_path / "damaged"
    damaged.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n")
    assert type(refused("there", server.options(identity=(str(damaged),)))) is errors.IdentityUnusable


def test_a_key_with_a_passphrase_asks_nobody(server: PrivateSshd, tmp_path: Path) -> None:
    import subprocess

    key = tmp_path / "locked"
    new_key(key)
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", str(key)], check=True)
    config = tmp_path / "config"
    config.write_text(server.config.read_text().replace(f"{server.here}/client_key", str(key)))
    error = refused("there", SshOptions(config=(str(config),)))
    assert type(error) is errors.AuthenticationFailed and "ssh-agent" in str(error)


def test_nobody_listens(server: PrivateSshd) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    error = refused(f"127.0.0.1:{port}", server.options())
    assert type(error) is errors.ConnectionRefused


def test_something_else_listens(server: PrivateSshd) -> None:
    def answer() -> None:
        with server_socket.accept()[0] as visitor:
            visitor.sendall(b"220 mail.example ESMTP\r\n" * 2000)

    with socket.create_server(("127.0.0.1", 0)) as server_socket:
        thread = threading.Thread(target=answer)
        thread.start()
        error = refused(f"127.0.0.1:{server_socket.getsockname()[1]}", server.options())
        thread.join()
    assert isinstance(error, errors.SshFailed | errors.ConnectionLost)


def test_a_damaged_ssh_config(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("Host *\n  Port many\n")
    error = refused("there", SshOptions(config=(str(config),)))
    assert type(error) is errors.SshConfigInvalid and "line 2" in str(error)
    error = refused("there", SshOptions(config=(str(tmp_path / "missing"),)))
    assert type(error) is errors.SshConfigInvalid


def test_a_jump_that_goes_round_in_a_circle(server: PrivateSshd, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("Host a\n  ProxyJump b\nHost b\n  ProxyJump a\n")
    error = refused("a", SshOptions(config=(str(config),)))
    assert type(error) is errors.SshConfigInvalid and "circle" in str(error)


def test_the_connection_is_made_for_speed_and_safety(server: PrivateSshd) -> None:
    async def scenario() -> dict[str, Any]:
        connection = await connect(THERE, server.options())
        try:
            names = ("send_cipher", "recv_cipher", "send_compression")
            found = {name: connection.get_extra_info(name) for name in names}
            sock = connection.get_extra_info("socket")
            return {**found, "nodelay": sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)}
        finally:
            connection.abort()

    assert run(scenario()) == {
        "send_cipher": "aes128-gcm@openssh.com",
        "recv_cipher": "aes128-gcm@openssh.com",
        "send_compression": "none",
        "nodelay": 1,
    }


def test_ciphers_of_ssh_config_are_respected(server: PrivateSshd, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("Ciphers aes256-ctr\n" + server.config.read_text())

    async def scenario() -> object:
        connection = await connect(THERE, SshOptions(config=(str(config),)))
        connection.abort()
        return connection.get_extra_info("send_cipher")

    assert run(scenario()) == "aes256-ctr"


def test_bridges_share_a_connection(server: PrivateSshd) -> None:
    """Each has a command of its own, its arguments as they are, and an end of its own."""

    async def bridged(connection: Any, options: SshOptions) -> tuple[socket.socket, Bridge]:
        ours, theirs = socket.socketpair()
        command = agent_command(options, ["ps", "a b'$x"])
        return ours, await open_bridge(connection, THERE, command, theirs, print)

    async def scenario() -> tuple[bytes, ProcessEnd, bytes]:
        connection = await connect(THERE, server.options())
        assert peer_address(connection) == "127.0.0.1"
        first, bridge = await bridged(connection, server.options('printf "%s|" "$@"; cat; exit 4'))
        second, other = await bridged(connection, server.options("cat"))
        with first, second:
            first.sendall(b"hello")
            first.shutdown(socket.SHUT_WR)
            answer, end = await asyncio.to_thread(read_all, first), await bridge.ended
            second.sendall(b"still there")
            second.shutdown(socket.SHUT_WR)
            rest = await asyncio.to_thread(read_all, second)
            assert (await other.ended).clean
        connection.abort()
        return answer, end, rest

    answer, end, rest = run(scenario())
    assert answer == b"ps|a b'$x|hello" and end.status == 4
    assert rest == b"still there"


def test_a_bridge_that_cannot_be_opened_leaves_the_connection(server: PrivateSshd) -> None:
    """sshd allows ten sessions a connection (MaxSessions); the eleventh is an error of the link."""

    async def scenario() -> None:
        connection = await connect(THERE, server.options())
        pairs = [socket.socketpair() for _ in range(11)]
        with contextlib.ExitStack() as ends:
            for ours, _ in pairs:
                ends.enter_context(ours)
            for _, theirs in pairs[:10]:
                await open_bridge(connection, THERE, "cat", theirs, print)
            with pytest.raises(LinkError):
                await open_bridge(connection, THERE, "cat", pairs[10][1], print)
            assert await asyncio.to_thread(pairs[10][0].recv, 1) == b""
            pairs[0][0].sendall(b"x")
            assert await asyncio.to_thread(pairs[0][0].recv, 1) == b"x"
        connection.abort()

    run(scenario())


def fingerprint(public_key: Path) -> str:
    import base64

    blob = base64.b64decode(public_key.read_text().split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def test_nothing_of_a_session_is_left_behind(server: PrivateSshd) -> None:
    """No descriptor stays open once a link is closed."""

    def descriptors() -> dict[str, str]:
        gc.collect()
        found = {}
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # the one that lists
                found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        return found

    before = descriptors()
    run(linked(server.options(), sent(b"hello")))
    assert descriptors() == before
