"""Layouts and numbers of the network's kernel interfaces, against the system's own headers."""

from __future__ import annotations

import subprocess

import pytest

from agent.kernel import addresses, netlink, packet, sock_diag, sock_filter, tcp_repair
from agent.resources.tcp import options

PROBE = r"""
#include <stddef.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <netinet/in.h>
#include <linux/if_addr.h>
#include <linux/if_packet.h>
#include <linux/filter.h>
#include <linux/inet_diag.h>
#include <linux/rtnetlink.h>
#include <linux/sockios.h>
#include <linux/tcp.h>
#define SHOW(name, value) printf("%s %ld\n", name, (long)(value))
int main(void) {
    SHOW("info.options", offsetof(struct tcp_info, tcpi_options));
    SHOW("info.unacked", offsetof(struct tcp_info, tcpi_unacked));
    SHOW("info.sacked", offsetof(struct tcp_info, tcpi_sacked));
    SHOW("info.rcv_ssthresh", offsetof(struct tcp_info, tcpi_rcv_ssthresh));
    SHOW("info.total_retrans", offsetof(struct tcp_info, tcpi_total_retrans));
    SHOW("info.segs_out", offsetof(struct tcp_info, tcpi_segs_out));
    SHOW("info.segs_in", offsetof(struct tcp_info, tcpi_segs_in));
    SHOW("window", sizeof(struct tcp_repair_window));
    SHOW("filter", sizeof(struct sock_filter));
    SHOW("fprog", sizeof(struct sock_fprog));
    SHOW("auxdata", sizeof(struct tpacket_auxdata));
    SHOW("diag_request", sizeof(struct inet_diag_req_v2));
    SHOW("diag_id", sizeof(struct inet_diag_sockid));
    SHOW("diag_message", sizeof(struct inet_diag_msg));
    SHOW("diag_inode", offsetof(struct inet_diag_msg, idiag_inode));
    SHOW("diag_md5", INET_DIAG_MD5SIG);
    SHOW("ifaddrmsg", sizeof(struct ifaddrmsg));
    SHOW("ifinfomsg", sizeof(struct ifinfomsg));
    SHOW("rtmsg", sizeof(struct rtmsg));
    SHOW("cacheinfo", sizeof(struct ifa_cacheinfo));
    SHOW("nlmsghdr", sizeof(struct nlmsghdr));
    SHOW("SIOCINQ", SIOCINQ);
    SHOW("SIOCOUTQ", SIOCOUTQ);
    SHOW("SIOCOUTQNSD", SIOCOUTQNSD);
    SHOW("SO_TXREHASH", SO_TXREHASH);
    SHOW("SO_BUF_LOCK", SO_BUF_LOCK);
    SHOW("SO_NETNS_COOKIE", SO_NETNS_COOKIE);
    SHOW("SO_MAX_PACING_RATE", SO_MAX_PACING_RATE);
    SHOW("TCP_INQ", TCP_INQ);
    SHOW("TCP_NOTSENT_LOWAT", TCP_NOTSENT_LOWAT);
    SHOW("TCP_USER_TIMEOUT", TCP_USER_TIMEOUT);
    SHOW("IPV6_TCLASS", IPV6_TCLASS);
    SHOW("IPV6_MINHOPCOUNT", IPV6_MINHOPCOUNT);
    SHOW("IP_MINTTL", IP_MINTTL);
}
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    where = tmp_path_factory.mktemp("probe")
    (where / "probe.c").write_text(PROBE)
    subprocess.run(["cc", "-o", where / "probe", where / "probe.c"], check=True)
    shown = subprocess.run([where / "probe"], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split() for line in shown.splitlines())}


def test_sizes(kernel: dict[str, int]) -> None:
    assert tcp_repair._WINDOW.size == kernel["window"]
    assert sock_filter._INSTRUCTION.size == kernel["filter"]
    assert sock_filter._PROGRAM.size == kernel["fprog"]
    assert packet._AUXDATA.size == kernel["auxdata"]
    assert sock_diag._ID.size == kernel["diag_id"]
    assert sock_diag._REQUEST.size + sock_diag._ID.size == kernel["diag_request"]
    assert sock_diag._MESSAGE.size + sock_diag._ID.size + sock_diag._TAIL.size == kernel["diag_message"]
    assert kernel["diag_inode"] == kernel["diag_message"] - 4
    assert addresses._IFADDRMSG.size == kernel["ifaddrmsg"]
    assert addresses._IFINFOMSG.size == kernel["ifinfomsg"]
    assert addresses._RTMSG.size == kernel["rtmsg"]
    assert addresses._CACHEINFO.size == kernel["cacheinfo"]
    assert netlink._HEADER.size == kernel["nlmsghdr"]


def test_tcp_info(kernel: dict[str, int]) -> None:
    """Each field is read from where the kernel puts it."""

    class Fake:
        raw = bytearray(tcp_repair._INFO_BYTES)

        def getsockopt(self, _level: int, _option: int, _size: int) -> bytes:
            return bytes(self.raw)

    wide = ("unacked", "sacked", "rcv_ssthresh", "total_retrans", "segs_out", "segs_in")
    for number, name in enumerate(wide, 1000):
        at = kernel[f"info.{name}"]
        Fake.raw[at : at + 4] = number.to_bytes(4, "little")
    Fake.raw[kernel["info.options"]] = 7
    Fake.raw[kernel["info.options"] + 1] = 0xA9
    info = tcp_repair.tcp_info(Fake())  # type: ignore[arg-type]
    assert [getattr(info, name) for name in wide] == list(range(1000, 1000 + len(wide)))
    assert (info.options, info.snd_wscale, info.rcv_wscale) == (7, 9, 10)


def test_numbers(kernel: dict[str, int]) -> None:
    for name in ("SIOCINQ", "SIOCOUTQ", "SIOCOUTQNSD"):
        assert getattr(tcp_repair, name) == kernel[name]
    names = kernel.keys() & options.OPTIONS.keys()
    assert len(names) == 8
    for name in names:
        assert options.OPTIONS[name].number == kernel[name]
    assert kernel["SO_NETNS_COOKIE"] == options.SO_NETNS_COOKIE
    assert kernel["diag_md5"] == sock_diag.INET_DIAG_MD5SIG


def test_netlink_attributes() -> None:
    packed = netlink.attribute(1, b"abc") + netlink.attribute(2 | 0x8000, b"") + netlink.attribute(1, b"last")
    assert netlink.attributes(packed) == {1: b"last", 2: b""}
    assert netlink.attributes(b"") == {}
    for malformed in (b"\x03\0\1\0", b"\xff\0\1\0abc"):
        with pytest.raises(ValueError, match="netlink attribute"):
            netlink.attributes(malformed)


@pytest.mark.parametrize("program", [b"", sock_filter._ACCEPT_ALL * 3])
def test_filters_of_ours_are_recognised_and_others_are_not(program: bytes) -> None:
    for kind in (sock_filter.Kind.LOCK, sock_filter.Kind.OPEN):
        for note in (0, 1, 255):
            whole = sock_filter._prefix(kind, note) + (program or sock_filter._ACCEPT_ALL)
            assert sock_filter.understand(whole) == sock_filter.Filter(kind, program, note)
            for other in (whole[8:], whole[:8], whole[:16]):
                assert sock_filter.understand(other).kind == sock_filter.Kind.APPLICATION
