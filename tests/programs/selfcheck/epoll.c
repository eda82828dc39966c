/* epoll: level, edge and one-shot registrations, each with its cookie, on eventfds and a pipe. */
#define _GNU_SOURCE
#include "check.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>

static const char name[] = "epoll";
enum { LEVEL, EDGE, ONESHOT, QUIET, KINDS };

static const uint32_t masks[KINDS] = {EPOLLIN, EPOLLIN | EPOLLET, EPOLLIN | EPOLLONESHOT, EPOLLIN | EPOLLPRI};
static int epoll, fds[KINDS];
/* Bits of the data that no one reading /proc/PID/fdinfo as 32 bits would keep. */
static uint64_t cookie(int kind)
{
    return 0xc001cafe00000000u + (uint64_t)kind * 0x100000001u;
}

static int seen[KINDS];

static void wait_once(void)
{
    struct epoll_event events[8];
    memset(seen, 0, sizeof seen);
    int count = epoll_wait(epoll, events, 8, 0);
    if (count < 0)
        complain(name, "epoll_wait: %s", strerror(errno));
    for (int i = 0; i < count; i++) {
        int kind = (int)(events[i].data.u64 & 0xff);
        if (kind >= KINDS || events[i].data.u64 != cookie(kind) || events[i].events != EPOLLIN) {
            complain(name, "event %x with cookie %lx", events[i].events, (uint64_t)events[i].data.u64);
            continue;
        }
        seen[kind]++;
    }
}

static void write_all(void)
{
    uint64_t one = 1;
    for (int kind = LEVEL; kind <= ONESHOT; kind++)
        if (write(fds[kind], &one, 8) != 8)
            complain(name, "write to an eventfd: %s", strerror(errno));
}

static void empty_all(void)
{
    uint64_t value;
    for (int kind = LEVEL; kind <= ONESHOT; kind++)
        expect(name, "read of an eventfd", read(fds[kind], &value, 8), 8);
}

static void arm_oneshot(void)
{
    struct epoll_event event = {masks[ONESHOT], {.u64 = cookie(ONESHOT)}};
    expect(name, "EPOLL_CTL_MOD", epoll_ctl(epoll, EPOLL_CTL_MOD, fds[ONESHOT], &event), 0);
}

/* An edge may be told again (epoll(7) allows it); it may never be lost. */
static void one_round(void)
{
    write_all();
    pause_ms(name, 30); /* readable, and no one has looked */
    wait_once();
    expect(name, "level-triggered event", seen[LEVEL], 1);
    expect(name, "edge-triggered event", seen[EDGE], 1);
    expect(name, "one-shot event", seen[ONESHOT], 1);
    pause_ms(name, 30); /* looked, and still readable */
    wait_once();
    expect(name, "level-triggered event, again", seen[LEVEL], 1);
    expect(name, "one-shot event, again", seen[ONESHOT], 0);
    empty_all();
    write_all();
    wait_once();
    expect(name, "next edge", seen[EDGE], 1);
    expect(name, "disarmed one-shot", seen[ONESHOT], 0);
    empty_all();
    pause_ms(name, 30); /* nothing to see */
    wait_once();
    expect(name, "events when nothing is readable", seen[LEVEL] + seen[EDGE] + seen[ONESHOT] + seen[QUIET], 0);
    arm_oneshot();
}

static void body(struct worker *self)
{
    while (lap(self))
        one_round();
}

static void start(void)
{
    epoll = (int)need(epoll_create1(EPOLL_CLOEXEC), "epoll_create1");
    for (int kind = 0; kind < KINDS; kind++) {
        fds[kind] = (int)need(eventfd(0, EFD_NONBLOCK), "eventfd");
        struct epoll_event event = {masks[kind], {.u64 = cookie(kind)}};
        need(epoll_ctl(epoll, EPOLL_CTL_ADD, fds[kind], &event), "EPOLL_CTL_ADD");
    }
    spawn(name, body, NULL);
}

static void damage_epoll(void)
{
    epoll_ctl(epoll, EPOLL_CTL_DEL, fds[LEVEL], NULL);
}

static void damage_cookie(void)
{
    struct epoll_event event = {masks[LEVEL], {.u64 = cookie(LEVEL) & 0xffffffff}};
    epoll_ctl(epoll, EPOLL_CTL_MOD, fds[LEVEL], &event);
}

static const struct breaker breakers[] = {{"epoll", damage_epoll}, {"epoll-cookie", damage_cookie}, {0}};
const struct checker epoll_checker = {name, start, breakers};
