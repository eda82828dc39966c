"""Calls that return by themselves: what they need, where their frames lie, and that they leave no trace."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from unit.children import Puppet, compiled, forked, puppet, spinner, wait_for

from agent import cleanup, scratch, visit
from agent.kernel import procfs, ptrace
from agent.kernel.arch import x86_64 as arch
from agent.kernel.arch.x86_64 import PAGE, Registers
from agent.kernel.memory import RemoteMemory
from agent.kernel.procfs import MapsLine
from agent.pageset import Range
from agent.resources import tcp
from agent.tracee import CODE, SCRATCH_SIZE, stop
from agent.visit import Caller, NoFoothold

NR_GETPID = 39
CALL, RESTORER = b"\x0f\x05\xc3", b"\x48\xc7\xc0\x0f\0\0\0\x0f\x05"


@contextlib.contextmanager
def memory_of(pid: int) -> Iterator[RemoteMemory]:
    memory = RemoteMemory(pid)
    try:
        yield memory
    finally:
        memory.close()


# --- the code for it ---


@given(st.binary(max_size=50), st.binary(max_size=50), st.booleans())
def test_a_return_path_is_found_wherever_it_is(before: bytes, after: bytes, together: bool) -> None:
    first, second = before + CALL + after, after + RESTORER + before
    texts = [(0x1000, first + second)] if together else [(0x1000, first), (0x9000, second)]
    path = arch.find_return(texts)
    assert path is not None
    content = {base + n: text[n:] for base, text in texts for n in range(len(text))}
    assert arch.is_return_path(path, content[path.call], content[path.restorer])


@pytest.mark.parametrize("text", [b"", CALL, RESTORER, b"\x0f\x05\x90" + RESTORER[:-1]])
def test_half_a_return_path_is_none(text: bytes) -> None:
    assert arch.find_return([(0x1000, text)]) is None
    assert not arch.is_return_path(arch.ReturnPath(0, 0), text[1:], text[1:])


@given(st.integers(1 << 20, 1 << 46), st.sampled_from([576, 832, 2696, 11008]))
def test_a_frame_ends_where_it_is_told_to(end: int, size: int) -> None:
    path = arch.ReturnPath(0x1111, 0x2222)
    address, frame = arch.returning_frame(path, end, Registers(rip=7), bytes(size), 3)
    assert address % 64 == 0 and end - 64 < address + len(frame) <= end
    assert len(frame) == arch.frame_size(bytes(size))
    assert frame[:8] == (0x2222).to_bytes(8, "little")  # where `ret` leads
    start = arch.returning_registers(Registers(rbx=5), path, address, 9, (1, 2, 3))
    assert (start.rip, start.rsp, start.rax, start.rdi, start.rbx) == (0x1111, address, 9, 1, 5)


def test_every_program_here_has_one() -> None:
    for pid in (os.getpid(), os.getppid()):
        with memory_of(pid) as memory:
            assert Caller(pid, memory).path


def test_a_program_without_one_is_said() -> None:
    """The seed of a shadow is such a program: a few bytes of code."""
    source = (
        'void _start(void) { for (;;) __asm__ volatile("syscall" : : "a"(34) : "rcx", "r11", "memory"); }'
    )
    program = compiled(source, "-nostdlib", "-static")
    pid = os.posix_spawn(program, [str(program)], {})
    try:
        with memory_of(pid) as memory, pytest.raises(NoFoothold, match="returns by itself"):
            Caller(pid, memory)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# --- where frames lie ---


def call_once(pid: int) -> Range:
    """Have it make a call; where the frame was."""
    with memory_of(pid) as memory:
        caller = Caller(pid, memory)
        with visit.visit(caller) as tid:
            assert caller.call(tid, "getpid", NR_GETPID) == pid
            assert caller.place is not None
            place = caller.place
            assert visit.marks(pid, memory) == [place]
        assert visit.marks(pid, memory) == []
        assert not any(memory.read(place[0], place[1] - place[0]))
        return place


def test_a_frame_lies_at_the_lower_end_of_the_stack_and_again_at_the_same_place() -> None:
    with puppet() as target:
        stack = visit.stack_of(target.pid)
        assert stack is not None
        for _ in range(3):
            assert call_once(target.pid)[0] == stack.start
        assert visit.stack_of(target.pid) == stack


def test_what_the_program_has_at_the_lower_end_stays() -> None:
    with puppet() as target, memory_of(target.pid) as memory:
        before = visit.stack_of(target.pid)
        assert before is not None
        target.fill(before.start + 100, 7, 1000)
        assert call_once(target.pid)[1] == before.start
        after = visit.stack_of(target.pid)
        assert after is not None and after.start < before.start
        assert memory.read(before.start, 1200) == bytes(100) + b"\7" * 1000 + bytes(100)


def test_our_own_stack_limit_is_none_for_the_stack_of_another() -> None:
    import resource

    limit = resource.getrlimit(resource.RLIMIT_STACK)
    with puppet() as target:
        stack = visit.stack_of(target.pid)
        assert stack is not None
        target.fill(stack.start, 1, 1)
        resource.setrlimit(resource.RLIMIT_STACK, (PAGE, limit[1]))
        try:
            assert call_once(target.pid)[1] == stack.start
            assert resource.getrlimit(resource.RLIMIT_STACK) == (PAGE, limit[1])
        finally:
            resource.setrlimit(resource.RLIMIT_STACK, limit)


# --- which thread is stopped ---


# Its first thread goes ever deeper, and looks at what it has left on its stack on the way back. It naps, so
# that the other one would be better to interrupt.
DEEPER = r"""
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <unistd.h>
static void *waiter(void *none)
{
    pause();
    return none;
}
static int deeper(uint64_t depth)
{
    volatile uint64_t frame[100];
    for (uint64_t n = 0; n < 100; n++)
        frame[n] = depth * 1000 + n;
    usleep(10);
    int changed = depth < 6000 ? deeper(depth + 1) : 0;
    for (uint64_t n = 0; n < 100; n++)
        changed += frame[n] != depth * 1000 + n;
    return changed;
}
int main(void)
{
    pthread_t thread;
    pthread_create(&thread, NULL, waiter, NULL);
    puts("ready");
    fflush(stdout);
    int changed = deeper(1);
    printf("changed %d\n", changed);
    fflush(stdout);
    pause();
}
"""


def test_a_stack_that_grows_meanwhile() -> None:
    visits = 0
    with subprocess.Popen([compiled(DEEPER, "-pthread")], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None and program.stdout.readline() == "ready\n"
        with memory_of(program.pid) as memory:
            while not select.select([program.stdout], [], [], 0)[0]:
                caller = Caller(program.pid, memory)
                with visit.visit(caller) as tid:
                    assert [caller.call(tid, "getpid", NR_GETPID) for _ in range(3)] == [program.pid] * 3
                visits += 1
        assert program.stdout.readline() == "changed 0\n"
        program.kill()
    assert visits > 10


def test_a_visit_shows_nowhere() -> None:
    with spinner() as target, memory_of(target.pid) as memory:
        for _ in range(20):
            caller = Caller(target.pid, memory)
            with visit.visit(caller) as tid:
                assert [caller.call(tid, "getpid", NR_GETPID) for _ in range(3)] == [target.pid] * 3
            target.progress(1)


def test_a_process_that_ended() -> None:
    with puppet() as target, memory_of(target.pid) as memory:
        caller = Caller(target.pid, memory)
        target.close()
        with pytest.raises(ProcessLookupError), visit.visit(caller):
            pass


# --- the scratch ---


@st.composite
def layouts(draw: st.DrawFn) -> list[MapsLine]:
    edges = sorted(draw(st.sets(st.integers(0x10, arch.TASK_SIZE // PAGE), min_size=2, max_size=12)))
    return [
        MapsLine(start * PAGE, end * PAGE, 3, False, 0, (0, 0), 0, "")
        for start, end in zip(edges[::2], edges[1::2], strict=False)
    ]


@given(layouts())
def test_a_scratch_never_touches_a_mapping(lines: list[MapsLine]) -> None:
    edges = [(0, arch.MMAP_MIN), *((m.start, m.end) for m in lines), (arch.TASK_SIZE, arch.TASK_SIZE)]
    assume(any(after[0] - before[1] > 3 << 32 for before, after in itertools.pairwise(edges)))
    start = scratch.choose(lines)
    end = start + SCRATCH_SIZE
    assert start > arch.MMAP_MIN and end < arch.TASK_SIZE and start % PAGE == 0
    assert all(end < m.start or m.end < start for m in lines)


def test_a_full_address_space() -> None:
    with pytest.raises(NoFoothold, match="full"):
        scratch.choose([MapsLine(arch.MMAP_MIN, arch.TASK_SIZE, 3, False, 0, (0, 0), 0, "")])


def found_in(target: Puppet) -> list[scratch.Found]:
    with memory_of(target.pid) as memory:
        return scratch.find(target.pid, memory)


def test_only_what_is_ours_is_taken_for_ours() -> None:
    with puppet() as target:
        place = scratch.choose(procfs.maps(target.pid))
        target.map(SCRATCH_SIZE, place)
        assert found_in(target) == [scratch.Found(place, None)]
        assert procfs.maps(target.pid)  # looking has touched nothing: it is still blank
        assert found_in(target) == [scratch.Found(place, None)]
        target.fill(place + SCRATCH_SIZE - 1, 1)
        assert found_in(target) == []  # the program uses it
        target.call(arch.NR_munmap, place, SCRATCH_SIZE)
        for size, at, protection in (
            (SCRATCH_SIZE + PAGE, place, 3),
            (SCRATCH_SIZE - PAGE, place, 3),
            (SCRATCH_SIZE, place + PAGE, 3),
            (SCRATCH_SIZE, place, 1),
        ):
            target.map(size, at, protection)
            assert found_in(target) == []
            assert cleanup.clean(target.pid) == []
            target.call(arch.NR_munmap, at, size)


def label(owner: scratch.Owner) -> bytes:
    return scratch._LABEL.pack(scratch._MAGIC, owner.pid, owner.born, owner.namespace)


@contextlib.contextmanager
def labelled(owner: scratch.Owner) -> Iterator[tuple[Puppet, int]]:
    """A process with a scratch of this owner."""
    with puppet() as target:
        place = scratch.choose(procfs.maps(target.pid))
        target.map(SCRATCH_SIZE, place)
        with memory_of(target.pid) as memory:
            memory.write(place, label(owner).ljust(CODE, b"\0"))
        yield target, place


def test_a_label_names_the_owner() -> None:
    with labelled(scratch._ourselves()) as (target, place):
        assert found_in(target) == [scratch.Found(place, scratch._ourselves())]
        target.call(arch.NR_mprotect, place, PAGE, 5)
        assert found_in(target) == [scratch.Found(place, scratch._ourselves())]


# --- cleaning up ---


def test_what_a_living_agent_has_is_left_alone() -> None:
    with labelled(scratch._ourselves()) as (target, _):
        with pytest.raises(cleanup.Busy, match=f"under way .agent {os.getpid()}"):
            cleanup.clean(target.pid)
        assert found_in(target)


def test_what_an_agent_elsewhere_has_is_left_alone() -> None:
    with labelled(scratch.Owner(1, 1, 1)) as (target, _):
        with pytest.raises(cleanup.Busy, match="another pid namespace"):
            cleanup.clean(target.pid)
        assert found_in(target)


def gone() -> scratch.Owner:
    """An agent that had our number before us."""
    ours = scratch._ourselves()
    return scratch.Owner(ours.pid, ours.born - 1, ours.namespace)


def test_what_a_dead_agent_has_is_removed_once(capsys: pytest.CaptureFixture[str]) -> None:
    with labelled(gone()) as (target, place):
        assert cleanup.clean(target.pid, born=1) == []  # another process had this number
        assert cleanup.run(target.pid) == 0
        assert capsys.readouterr().out == f"removed the mapping at {place:#x}\n"
        assert found_in(target) == []
        assert cleanup.run(target.pid) == 0
        assert capsys.readouterr().out == ""
        assert target.call(NR_GETPID) == target.pid


def test_a_process_that_is_traced_or_stopped_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with labelled(gone()) as (target, _):
        ptrace.seize(target.pid)
        assert cleanup.run(target.pid) == cleanup.EXIT_BUSY
        assert "being traced" in capsys.readouterr().err
        ptrace.interrupt(target.pid)
        ptrace.wait(target.pid)
        ptrace.detach(target.pid)
        os.kill(target.pid, signal.SIGSTOP)
        wait_for(lambda: procfs.stat(target.pid).state == "T", "it to stop")
        assert cleanup.run(target.pid) == cleanup.EXIT_BUSY
        assert "--resume" in capsys.readouterr().err
        os.kill(target.pid, signal.SIGCONT)
        wait_for(lambda: procfs.stat(target.pid).state == "S", "it to go on")
        assert cleanup.run(target.pid) == 0
        assert found_in(target) == []


def test_a_thread_inside_is_waited_for() -> None:
    """It comes back by itself, after a time."""
    with labelled(gone()) as (target, place):
        # nanosleep with its stack in the scratch, as a thread that waits for its tracer has
        with memory_of(target.pid) as memory:
            caller = Caller(target.pid, memory)
            memory.write(place + 0x4000, (1).to_bytes(8, "little") + bytes(8))
            ptrace.seize(target.pid)
            stop([target.pid], time.monotonic() + 5)
            back = arch.as_restarted(ptrace.get_registers(target.pid))
            frame_at, frame = arch.returning_frame(
                caller.path,
                place + 0x9000,
                back,
                ptrace.get_xstate(target.pid),
                ptrace.get_sigmask(target.pid),
            )
            memory.write(frame_at, frame)
            start = arch.returning_registers(
                back, caller.path, frame_at, arch.NR_nanosleep, (place + 0x4000, 0)
            )
            ptrace.set_registers(target.pid, start)
            ptrace.detach(target.pid)
        began = time.monotonic()
        assert cleanup.clean(target.pid) == [f"removed the mapping at {place:#x}"]
        assert time.monotonic() - began > 0.5
        assert target.call(NR_GETPID) == target.pid


def test_sockets_that_are_held_are_let_go() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        client.connect(listener.getsockname())
        server, _ = listener.accept()
        with server, forked(lambda: None) as pid:
            tcp.lock(server.fileno())
            tcp.capture(server.fileno())
            os.kill(pid, signal.SIGSTOP)
            wait_for(lambda: procfs.stat(pid).state == "T", "it to stop")
            with pytest.raises(cleanup.Busy, match="may live on another host"):
                cleanup.clean(pid)
            assert tcp.held(server.fileno())
            released = f"unlocked the socket of descriptor {server.fileno()}"
            assert cleanup.clean(pid, resume=True) == [released, "continued it"]
            wait_for(lambda: procfs.stat(pid).state == "S", "it to go on")
            assert cleanup.clean(pid) == []
            client.sendall(b"hello")
            assert server.recv(5) == b"hello"


def test_nothing_of_a_process_that_is_gone() -> None:
    assert cleanup.clean(4_000_000) == []
