"""`migrate-agent` with a stand-in for its engine alone: `stand_in_front.py SCENARIO serve|connect|source`.

The scenario is that of stand_in_engine.py; service, connection and front are the real ones.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

ENGINE = Path(__file__).with_name("stand_in_engine.py")
IDLE_EXIT = 1.0


def main(scenario: str, command: str, *options: str) -> int:
    from agent.front import serve
    from agent.server import connect, log, places, service

    program = [sys.executable, __file__, scenario]
    if command == "source":
        engine = [sys.executable, str(ENGINE), scenario], dict(os.environ)
        return asyncio.run(serve(0, 1, engine, name=options[1] if options else None))
    if command == "connect":
        return connect.bridge(places.default(), [*program, "serve"], dict(os.environ))
    log.set_up(2, "text")
    where = places.default()
    return service.run(
        service.Settings(places=where, program=(program, dict(os.environ)), idle_exit=IDLE_EXIT)
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
