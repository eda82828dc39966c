/* System calls that are waiting whenever the process is stopped: none may be interrupted without a handler having
 * run, none may return early, and those that wait for ever may not return at all. */
#define _GNU_SOURCE
#include "check.h"

#include <linux/futex.h>
#include <math.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/syscall.h>

static struct timespec length_of(double seconds)
{
    return (struct timespec){(time_t)seconds, (long)(fmod(seconds, 1) * 1e9)};
}

static long report(long result)
{
    return result < 0 ? -errno : result;
}

static int quiet_pipe[2], epoll; /* no one writes */
static uint32_t futex_word = 5;

/* Each returns what the system call answered, or -errno; in brackets what it has to answer in time. */
static long by_nanosleep(double seconds)
{
    struct timespec length = length_of(seconds);
    return report(nanosleep(&length, NULL));
}

static long by_clock_nanosleep(double seconds)
{
    struct timespec due = length_of(seconds_of(CLOCK_MONOTONIC) + seconds);
    return -clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL);
}

static long by_clock_nanosleep_real(double seconds)
{
    struct timespec length = length_of(seconds);
    return -clock_nanosleep(CLOCK_REALTIME, 0, &length, NULL);
}

static long by_poll(double seconds)
{
    struct pollfd one = {quiet_pipe[0], POLLIN, 0};
    return report(poll(&one, 1, (int)ceil(seconds * 1e3)));
}

static long by_ppoll(double seconds)
{
    struct timespec length = length_of(seconds);
    struct pollfd one = {quiet_pipe[0], POLLIN, 0};
    return report(ppoll(&one, 1, &length, NULL));
}

static long by_select(double seconds)
{
    fd_set set;
    FD_ZERO(&set);
    FD_SET(quiet_pipe[0], &set);
    struct timeval length = {(time_t)seconds, (suseconds_t)(fmod(seconds, 1) * 1e6) + 1};
    return report(select(quiet_pipe[0] + 1, &set, NULL, NULL, &length));
}

static long by_futex(double seconds)
{
    struct timespec length = length_of(seconds);
    return report(syscall(SYS_futex, &futex_word, FUTEX_WAIT | FUTEX_PRIVATE_FLAG, 5, &length, NULL, 0));
}

static long by_futex_absolute(double seconds)
{
    struct timespec due = length_of(seconds_of(CLOCK_MONOTONIC) + seconds);
    const int operation = FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG;
    return report(syscall(SYS_futex, &futex_word, operation, 5, &due, NULL, FUTEX_BITSET_MATCH_ANY));
}

static long by_epoll_wait(double seconds)
{
    struct epoll_event event;
    return report(epoll_wait(epoll, &event, 1, (int)ceil(seconds * 1e3)));
}

static long by_sigtimedwait(double seconds)
{
    struct timespec length = length_of(seconds);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTTIN); /* which no one sends */
    return report(sigtimedwait(&set, NULL, &length));
}

static const struct kind {
    const char *name;
    long (*sleep)(double seconds);
    long wanted;
    double resolution; /* a timeout may be rounded, and measured, by so much */
} kinds[] = {
    {"nanosleep", by_nanosleep, 0, 0},
    {"clock_nanosleep", by_clock_nanosleep, 0, 0},
    {"clock_nanosleep-real", by_clock_nanosleep_real, 0, 0},
    {"poll", by_poll, 0, 0},
    {"ppoll", by_ppoll, 0, 0},
    {"select", by_select, 0, 0},
    {"futex", by_futex, -ETIMEDOUT, 0},
    {"futex-absolute", by_futex_absolute, -ETIMEDOUT, 0},
    {"epoll_wait", by_epoll_wait, 0, 0},
    {"sigtimedwait", by_sigtimedwait, -EAGAIN, 0},
};

static void check_length(const char *name, double asked, double took)
{
    /* A double keeps a time in seconds to some 100 ns. */
    if (took < asked - 1e-6)
        complain(name, "slept %.6f s instead of %.6f", took, asked);
    if (took > asked + options.max_gap)
        complain(name, "slept %.3f s too long (%.3f)", took - asked, asked);
}

static pthread_t stray_target;

static void sleep_in_turn(struct worker *self)
{
    const struct kind *kind = self->argument;
    struct random random = {(uint64_t)self->index};
    if (kind == kinds) {
        stray_target = pthread_self();
        unblock(SIG_STRAY);
    }
    while (lap(self)) {
        double asked = 0.020 + (double)random_below(&random, 1200) / 1e3;
        double begin = seconds_of(CLOCK_MONOTONIC);
        long result = kind->sleep(asked);
        double took = seconds_of(CLOCK_MONOTONIC) - begin;
        if (result == kind->wanted)
            check_length(self->name, asked, took);
        else
            complain(self->name, "returned %ld (%s)", result, result < 0 ? strerror((int)-result) : "");
    }
}

/* ---- a sleep that is interrupted by a handler, as it should be, and goes on with what was left */
static atomic_int pokes;
static pthread_t poked;

static void on_poke(int number, siginfo_t *info, void *context)
{
    (void)number, (void)info, (void)context;
    pokes++;
}

static void be_poked(struct worker *self)
{
    poked = pthread_self();
    unblock(SIG_POKE);
    while (lap(self)) {
        struct timespec left = length_of(0.5);
        double begin = seconds_of(CLOCK_MONOTONIC);
        int before = pokes;
        while (nanosleep(&left, &left) < 0) {
            if (errno != EINTR || pokes == before)
                complain(self->name, "nanosleep without a handler: %s", strerror(errno));
            before = pokes;
        }
        check_length(self->name, 0.5, seconds_of(CLOCK_MONOTONIC) - begin);
    }
}

static void poke(struct worker *self)
{
    struct random random = {3};
    while (lap(self)) {
        pause_ms(self->name, 20 + (double)random_below(&random, 400));
        if (poked)
            pthread_kill(poked, SIG_POKE);
    }
}

/* ---- a read that waits until something is written */
static int woken_pipe[2];

static void be_woken(struct worker *self)
{
    for (uint64_t wanted = 1; lap(self); wanted++) {
        uint64_t got = 0;
        if (expect(self->name, "read", read(woken_pipe[0], &got, 8), 8))
            expect(self->name, "word read", (long)got, (long)wanted);
    }
}

static void wake(struct worker *self)
{
    struct random random = {4};
    for (uint64_t word = 1;; word++) {
        bool more = lap(self);
        pause_ms(self->name, (double)random_below(&random, 900));
        expect(self->name, "write", write(woken_pipe[1], &word, 8), 8);
        if (!more)
            return;
    }
}

/* ---- for ever */
static void sit_in_pause(struct worker *self)
{
    int result = pause();
    complain(self->name, "pause returned %d (%s)", result, strerror(errno));
}

static void sit_in_read(struct worker *self)
{
    char byte;
    ssize_t result = read(quiet_pipe[0], &byte, 1);
    complain(self->name, "read returned %zd (%s)", result, strerror(errno));
}

static void sit_in_futex(struct worker *self)
{
    long result = syscall(SYS_futex, &futex_word, FUTEX_WAIT | FUTEX_PRIVATE_FLAG, 5, NULL, NULL, 0);
    complain(self->name, "futex returned %ld (%s)", result, strerror(errno));
}

static void sit_in_poll(struct worker *self)
{
    struct pollfd one = {quiet_pipe[0], POLLIN, 0};
    int result = poll(&one, 1, -1);
    complain(self->name, "poll returned %d (%s)", result, strerror(errno));
}

static void sit_in_epoll(struct worker *self)
{
    struct epoll_event event;
    int result = epoll_wait(epoll, &event, 1, -1);
    complain(self->name, "epoll_wait returned %d (%s)", result, strerror(errno));
}

static void start(void)
{
    need(pipe(quiet_pipe) | pipe(woken_pipe), "pipe");
    epoll = (int)need(epoll_create1(0), "epoll_create1");
    struct epoll_event event = {EPOLLIN, {.fd = quiet_pipe[0]}};
    need(epoll_ctl(epoll, EPOLL_CTL_ADD, quiet_pipe[0], &event), "EPOLL_CTL_ADD");
    install(SIG_POKE, on_poke, 0);
    install(SIG_STRAY, on_poke, 0);
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++)
        spawn(kinds[i].name, sleep_in_turn, (void *)&kinds[i]);
    spawn("poked", be_poked, NULL);
    spawn("poke", poke, NULL);
    spawn("woken-read", be_woken, NULL);
    spawn("wake", wake, NULL);
    spawn_forever("pause", sit_in_pause, NULL);
    spawn_forever("read", sit_in_read, NULL);
    spawn_forever("futex-forever", sit_in_futex, NULL);
    spawn_forever("poll-forever", sit_in_poll, NULL);
    spawn_forever("epoll-forever", sit_in_epoll, NULL);
}

/* A return without the excuse of a handler, as a stop that was badly undone would give. */
static void damage_sleep(void)
{
    pthread_kill(stray_target, SIG_STRAY);
}

static void damage_forever(void)
{
    futex_word++;
    syscall(SYS_futex, &futex_word, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, 99, NULL, NULL, 0);
}

static void damage_wake(void)
{
    uint64_t word = 0;
    if (write(woken_pipe[1], &word, 8) != 8)
        abort();
}

static const struct breaker breakers[] = {
    {"sleep", damage_sleep}, {"futex", damage_forever}, {"wake", damage_wake}, {0}};
const struct checker sleepers_checker = {"sleepers", start, breakers};
