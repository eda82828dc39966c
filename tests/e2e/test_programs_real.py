"""Programs of the real world, each moved there and back in the middle of a conversation on one connection."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.support import SERVICE, Hosts, Moved, Place
from lab.fixture import until
from programs.status import PROGRAMS

NGINX = """
daemon off;
master_process off;
pid {directory}/nginx.pid;
error_log {directory}/nginx-error.log;
events {{ }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    keepalive_timeout 3600s;
    client_body_temp_path {directory}/nginx-body;
    proxy_temp_path {directory}/nginx-proxy;
    fastcgi_temp_path {directory}/nginx-fastcgi;
    uwsgi_temp_path {directory}/nginx-uwsgi;
    scgi_temp_path {directory}/nginx-scgi;
    server {{
        listen {address}:{port};
        root {directory}/www;
    }}
}}
"""


class Conversation:
    """talk.py in the host "client"."""

    def __init__(self, lab: Hosts, place: Place, kind: str, port: int, *options: object) -> None:
        self.stop_file, self.progress = place.path / "stop", place.path / "progress"
        files = ["--until-file", self.stop_file, "--progress", self.progress]
        command = [PROGRAMS / "talk.py", kind, f"{SERVICE}:{port}", *files, *options]
        self.process: subprocess.Popen[str] = lab.attend("client", *command)

    def answers(self) -> int:
        text = self.progress.read_text() if self.progress.exists() else ""
        return int(text or 0)

    def wait_for_answers(self, count: int) -> None:
        wanted = self.answers() + count
        until(lambda: self.answers() >= wanted or self.process.poll() is not None, f"{count} answers", 60)

    def end(self) -> None:
        self.stop_file.touch()
        output, errors = self.process.communicate(timeout=90)
        result = json.loads(output or "{}")
        assert result.get("failures") == [], f"{output}{errors}"


@pytest.fixture
def service(lab: Hosts) -> Iterator[str]:
    lab.run("alpha", "ip", "address", "add", f"{SERVICE}/24", "dev", "eth0")
    yield SERVICE
    for host in ("alpha", "beta"):
        lab.ask(host, "ip", "address", "del", f"{SERVICE}/24", "dev", "eth0")


def there_and_back(lab: Hosts, pid: int, conversation: Conversation) -> None:
    server = Moved(lab, "alpha", pid)
    try:
        conversation.wait_for_answers(20)
        for host in ("beta", "alpha"):
            server.move(host)
            conversation.wait_for_answers(20)
        conversation.end()
    finally:
        lab.kill(server.host, server.pid)
        conversation.process.kill()


def test_cpython_with_threads(lab: Hosts, place: Place, service: str) -> None:
    pid = lab.start("alpha", "/usr/bin/python3", PROGRAMS / "http_threads.py", service, 8001)
    there_and_back(lab, pid, Conversation(lab, place, "counting", 8001))


def test_node(lab: Hosts, place: Place, service: str) -> None:
    pid = lab.start("alpha", "node", PROGRAMS / "http_server.js", service, 8002)
    there_and_back(lab, pid, Conversation(lab, place, "counting", 8002))


def nginx_configuration(directory: Path, address: str, port: int) -> Path:
    (directory / "www").mkdir()
    (directory / "www" / "file").write_bytes(os.urandom(300_000))
    path = directory / "nginx.conf"
    path.write_text(NGINX.format(directory=directory, address=address, port=port))
    return path


def test_nginx(lab: Hosts, place: Place, service: str) -> None:
    configuration = nginx_configuration(place.path, service, 8003)
    pid = lab.start("alpha", "nginx", "-c", configuration, "-e", place.path / "nginx-error.log")
    content = place.path / "www" / "file"
    there_and_back(lab, pid, Conversation(lab, place, "file", 8003, "--content", content))


def test_memcached(lab: Hosts, place: Place, service: str) -> None:
    pid = lab.start("alpha", "memcached", "-u", "root", "-l", service, "-p", 8004, "-t", 4, "-m", 64)
    there_and_back(lab, pid, Conversation(lab, place, "memcached", 8004))
