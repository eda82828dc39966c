"""What numbers, texts and lists from elsewhere may be: types for the fields of structs that are received.

msgspec compares with them while it decodes, a length before it makes the list, so what a message can cost is
bounded by its type. The bounds are the kernel's own or far above what a process has; they are no part of the
protocol, and may be raised. What one field cannot tell is in `agent.checks`.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

# what decoding raises for data that is not of the wanted type
MALFORMED: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

MAX_MAPPINGS: Final = 1 << 20
MAX_RANGES: Final = 1 << 21  # of one message
MAX_THREADS: Final = 1 << 16
MAX_FILES: Final = 1 << 17
MAX_SOCKETS: Final = 1 << 18
MAX_QUEUED: Final = 1 << 17  # signals of one queue
MAX_DESCRIPTORS: Final = 256  # of one message
MAX_DUPLICATES: Final = 1 << 14  # of one open file description
MAX_NOTES: Final = 1 << 14  # blockers, notices, paths
MAX_PATH: Final = 2 * 4096  # of a link in /proc, with all that the kernel adds to it

# integers; no number on the link is longer than 64 bits
U31 = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
U32 = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
U63 = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
U64 = Annotated[int, Meta(ge=0)]
I32 = Annotated[int, Meta(ge=-(1 << 31), le=(1 << 31) - 1)]
I64 = Annotated[int, Meta(le=(1 << 63) - 1)]
I63 = Annotated[int, Meta(ge=-(1 << 62), le=1 << 62)]  # their sums and differences have 64 bits
Index = Annotated[int, Meta(ge=-1, le=MAX_FILES)]  # into a table of files; -1: none
Pid = Annotated[int, Meta(ge=1, le=1 << 22)]  # PID_MAX_LIMIT
OwnThread = Annotated[int, Meta(ge=0, le=1 << 22)]  # 0: the process
SignalNumber = Annotated[int, Meta(ge=1, le=64)]
FileDescriptor = Annotated[int, Meta(ge=0, le=1 << 30)]
Nonblocking = Annotated[int, Meta(ge=0, le=0o4000, multiple_of=0o4000)]  # O_NONBLOCK or nothing
Mode = Annotated[int, Meta(ge=0, le=0o7777)]
Finite = Annotated[float, Meta(ge=-1e300, le=1e300)]  # no NaN, which JSON does not have

# texts and bytes
Name = Annotated[str, Meta(max_length=128)]  # where the check for zero bytes is another one's
Word = Annotated[str, Meta(max_length=128, pattern=r"\A[^\0]*\Z")]
# a migration's name (a ULID, `agent.server.store`) or none: it becomes the name of a file
MigrationName = Annotated[str, Meta(pattern=r"\A([0-7][0-9A-HJKMNP-TV-Z]{25})?\Z")]
BootId = Annotated[str, Meta(pattern=r"\A[0-9a-f-]{0,36}\Z")]
Text = Annotated[str, Meta(max_length=1 << 20)]
PathText = Annotated[str, Meta(max_length=MAX_PATH, pattern=r"\A[^\0]*\Z")]
Digest = Annotated[bytes, Meta(max_length=64)]
Siginfo = Annotated[bytes, Meta(min_length=128, max_length=128)]
SigQueue = Annotated[tuple[Siginfo, ...], Meta(max_length=MAX_QUEUED)]
Itimer = Annotated[bytes, Meta(min_length=32, max_length=32)]  # struct itimerval, and itimerspec
