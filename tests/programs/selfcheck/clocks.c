/* Clocks, by the vDSO and by the system call: none goes back, none jumps, and they agree with each other.
 * The same thread takes the heartbeat whose longest gap is the pause as this process felt it. */
#define _GNU_SOURCE
#include "check.h"

#include <math.h>
#include <sys/syscall.h>
#include <sys/time.h>

static const char name[] = "clocks";

static const struct watched {
    int clock;
    const char *name;
} watched[] = {{CLOCK_MONOTONIC, "CLOCK_MONOTONIC"},
               {CLOCK_BOOTTIME, "CLOCK_BOOTTIME"},
               {CLOCK_MONOTONIC_COARSE, "CLOCK_MONOTONIC_COARSE"}};
enum { CLOCKS = sizeof watched / sizeof watched[0] };

static double last[CLOCKS];
static double offset[CLOCKS]; /* CLOCK_REALTIME - clock */
static _Atomic int step_back_ms, jump_ms;

static double by_system_call(int clock)
{
    struct timespec now;
    syscall(SYS_clock_gettime, clock, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static void sample(int index, double now, const char *how)
{
    now += (atomic_exchange(&jump_ms, 0) - atomic_exchange(&step_back_ms, 0)) / 1e3;
    if (last[index] > 0 && now < last[index])
        complain(name, "%s (%s) went back by %.9f s", watched[index].name, how, last[index] - now);
    if (last[index] > 0 && now > last[index] + options.max_gap)
        complain(name, "%s (%s) jumped by %.3f s", watched[index].name, how, now - last[index]);
    last[index] = now;
}

/* Against CLOCK_REALTIME, which no time namespace shifts: a clock that was put wrong by a little shows here. */
static void compare(int index)
{
    double before = seconds_of(CLOCK_REALTIME), now = seconds_of(watched[index].clock);
    double after = seconds_of(CLOCK_REALTIME);
    if (after - before > 0.001)
        return; /* interrupted in between: says nothing */
    double difference = after - now;
    if (offset[index] != 0 && fabs(difference - offset[index]) > 0.050)
        complain(name, "%s stepped by %.3f s against CLOCK_REALTIME", watched[index].name,
                 offset[index] - difference);
    offset[index] = difference;
}

static void check_coarse_agreement(void)
{
    struct timeval day;
    double before = seconds_of(CLOCK_REALTIME);
    gettimeofday(&day, NULL);
    double got = (double)day.tv_sec + (double)day.tv_usec / 1e6, after = seconds_of(CLOCK_REALTIME);
    if (got < before - 0.001 || got > after + 0.001)
        complain(name, "gettimeofday disagrees: %.6f, not from %.6f to %.6f", got, before, after);
    time_t whole = time(NULL);
    if ((double)whole < before - 1.1 || (double)whole > after + 1.1)
        complain(name, "time disagrees: %ld, not %.6f", whole, before);
}

static void body(struct worker *self)
{
    struct timespec millisecond = {0, 1000000};
    while (lap(self)) {
        heartbeat();
        for (int i = 0; i < CLOCKS; i++) {
            sample(i, by_system_call(watched[i].clock), "system call");
            sample(i, seconds_of(watched[i].clock), "vDSO");
            sample(i, by_system_call(watched[i].clock), "system call");
            compare(i);
        }
        check_coarse_agreement();
        expect(name, "nanosleep", nanosleep(&millisecond, NULL), 0);
    }
}

static void start(void)
{
    spawn(name, body, NULL);
}

static void damage_clock(void)
{
    step_back_ms = 100;
}

static void damage_jump(void)
{
    jump_ms = (int)(options.max_gap * 1e3) + 1000;
}

static const struct breaker breakers[] = {{"clock", damage_clock}, {"clock-jump", damage_jump}, {0}};
const struct checker clocks_checker = {name, start, breakers};
