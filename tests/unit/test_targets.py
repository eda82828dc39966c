"""Names of hosts and processes: what is accepted comes back as written, the rest is refused with a reason."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.targets import PID_MAX, ProcessTarget, parse_process
from transport.target import HostTarget, InvalidTarget, parse_host

labels = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,20}", fullmatch=True)
names = st.lists(labels, min_size=1, max_size=4).map(".".join)
addresses = st.ip_addresses(v=4).map(str) | st.ip_addresses(v=6).map(str)
users = st.from_regex(r"[A-Za-z0-9_.][A-Za-z0-9_.@+-]{0,20}", fullmatch=True)
hosts = st.builds(
    HostTarget,
    host=names | addresses,
    user=st.none() | users,
    port=st.none() | st.integers(1, 65535),
)
processes = st.builds(ProcessTarget, pid=st.integers(1, PID_MAX), host=st.none() | hosts)


@given(hosts)
def test_a_host_survives_being_written_and_read(host: HostTarget) -> None:
    assert parse_host(str(host)) == host


@given(processes)
def test_a_process_survives_being_written_and_read(process: ProcessTarget) -> None:
    assert parse_process(str(process)) == process


@given(st.text(max_size=40))
def test_any_text_is_a_host_or_refused(text: str) -> None:
    try:
        host = parse_host(text)
    except InvalidTarget as error:
        assert str(error)
        return
    assert not host.host.startswith("-")
    assert not (set(host.host) & set(" \t\n\0/;|&$`'\""))
    assert parse_host(str(host)) == host


@given(st.text(alphabet="0123456789:@[]abc.-%", max_size=24))
def test_any_text_is_a_process_or_refused(text: str) -> None:
    try:
        process = parse_process(text)
    except InvalidTarget:
        return
    assert 1 <= process.pid <= PID_MAX
    assert parse_process(str(process)) == process


@given(st.ip_addresses(v=6))
def test_an_ipv6_address_needs_brackets(address: ipaddress.IPv6Address) -> None:
    with pytest.raises(InvalidTarget, match="brackets"):
        parse_host(str(address))
    assert parse_host(f"root@[{address}]:22") == HostTarget(str(address), "root", 22)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("alpha:1234", ProcessTarget(1234, HostTarget("alpha"))),
        ("1234", ProcessTarget(1234)),
        ("root@alpha:1234", ProcessTarget(1234, HostTarget("alpha", "root"))),
        ("alpha:2222:1234", ProcessTarget(1234, HostTarget("alpha", None, 2222))),
        ("[::1]:1234", ProcessTarget(1234, HostTarget("::1"))),
        ("me@[fe80::1%eth0]:22:1234", ProcessTarget(1234, HostTarget("fe80::1%eth0", "me", 22))),
        ("me@corp@alpha:7", ProcessTarget(7, HostTarget("alpha", "me@corp"))),
    ],
)
def test_ways_to_name_a_process(text: str, expected: ProcessTarget) -> None:
    assert parse_process(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("alpha", "not a process number"),
        ("alpha:", "not a process number"),
        (":1234", "no host is named"),
        ("alpha:0", "not a process number"),
        ("alpha:-1", "not a process number"),
        ("alpha:01", "not a process number"),
        ("alpha:4194305", "not a process number"),
        ("alpha:١٢", "not a process number"),
        ("::1:1234", "brackets"),
        ("[::1:1234", "never closed"),
        ("[10.0.0.1]:1234", "not an IPv6 address"),
        ("[fe80::1%a b]:1234", "not the name of an interface"),
        ("[::1]x:1234", "after the bracket"),
        ("-oProxyCommand=x:1234", "not a host name"),
        ("@alpha:1234", "not a user name"),
        ("-l@alpha:1234", "not a user name"),
        ("a b@alpha:1234", "not a user name"),
        ("alpha:0:1234", "not a port"),
        ("alpha:65536:1234", "not a port"),
        ("al/pha:1234", "not a host name"),
        ("a..b:1234", "not a host name"),
        (f"{'a' * 64}:1234", "not a host name"),
    ],
)
def test_what_is_refused_says_why(text: str, reason: str) -> None:
    with pytest.raises(InvalidTarget, match=reason):
        parse_process(text)
