"""redis-server under load on established connections, there and back: its clients notice nothing."""

from __future__ import annotations

import pytest
from e2e.redis_session import RedisSession
from e2e.support import FULL, SERVICE, Hosts, Place

MEGABYTES = 1024 if FULL else 256


def holders_of_address(lab: Hosts) -> list[str]:
    shown = {host: lab.run(host, "ip", "-4", "address", "show", "eth0") for host in ("alpha", "beta")}
    return [host for host, addresses in shown.items() if SERVICE in addresses]


@pytest.mark.timeout(900)
def test_redis_there_and_back(lab: Hosts, place: Place) -> None:
    session = RedisSession(lab, place, MEGABYTES)
    try:
        assert session.fill()["bytes"] >= MEGABYTES << 20
        digest = session.digest()
        session.start_clients()
        for destination in ("beta", "alpha"):
            report = session.server.move(destination)
            assert holders_of_address(lab) == [destination]
            assert any(SERVICE in address for address in report["address_moved"])
            assert report["memory_bytes"] > MEGABYTES << 20
            assert report["pause_ms"] > 0 and report["rounds"] and report["phases"]
            session.wait_for_commands(2000)
        seen = session.stop_clients()
        assert seen["failures"] == []
        assert seen["clients"] == 10 and seen["written_bytes"] > 1 << 20
        assert seen["longest_stall"]["ms"] > 0
        verified = session.load("verify")
        assert verified["rewritten"] > 0 and verified["increments"] > 0
        assert session.digest() == digest
        after = session.info()
        assert after["run_id"] == session.before["run_id"]
        assert after["process_id"] == session.before["process_id"]
        assert int(after["uptime_in_seconds"]) >= int(session.before["uptime_in_seconds"])
    finally:
        session.close()
