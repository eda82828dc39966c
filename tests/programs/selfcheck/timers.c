/* Timers: POSIX timers to the process and to a thread, interval timers, timerfds. Every period is either seen as a
 * tick or accounted as an overrun, but for what a pause of max_gap may swallow; a disarmed timer stays silent. */
#define _GNU_SOURCE
#include "check.h"

#include <math.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timerfd.h>

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

static const char name[] = "timers";
enum { COOKIE = 0x5eed0001, THREAD_COOKIE = 0x5eed0002, LONG_SECONDS = 3600 };

/* Something periodic whose ticks are counted. */
struct source {
    const char *what;
    double interval;
    counter_t ticks;
    uint64_t counted; /* at the beginning of this window */
    double begin;
};
static struct source posix_ticks = {.what = "POSIX timer to the process", .interval = 0.010},
                     thread_ticks = {.what = "POSIX timer to a thread", .interval = 0.025},
                     real_ticks = {.what = "ITIMER_REAL", .interval = 0.020},
                     fd_ticks = {.what = "timerfd", .interval = 0.015},
                     slow_fd_ticks = {.what = "timerfd that is rarely read", .interval = 0.007};

static timer_t posix_timer, thread_timer, disarmed_timer, long_timer;
static int fd, slow_fd, disarmed_fd, owner;
static counter_t virtual_ticks;
static double long_end; /* when long_timer is due, by CLOCK_MONOTONIC */

static void on_posix(int number, siginfo_t *info, void *context)
{
    (void)number, (void)context;
    if (info->si_code != SI_TIMER || info->si_value.sival_int != COOKIE)
        complain(name, "signal of the process timer: code %d, value %x", info->si_code, info->si_value.sival_int);
    posix_ticks.ticks += 1 + (uint64_t)info->si_overrun;
}

static void on_thread(int number, siginfo_t *info, void *context)
{
    (void)number, (void)context;
    if (info->si_code != SI_TIMER || info->si_value.sival_int != THREAD_COOKIE || gettid() != owner)
        complain(name, "signal of the thread timer: code %d, value %x, in thread %d", info->si_code,
                 info->si_value.sival_int, gettid());
    thread_ticks.ticks += 1 + (uint64_t)info->si_overrun;
}

static void on_alarm(int number, siginfo_t *info, void *context)
{
    (void)info, (void)context;
    if (number == SIGALRM)
        real_ticks.ticks++;
    else
        virtual_ticks++;
}

static void on_disarmed(int number, siginfo_t *info, void *context)
{
    (void)number, (void)info, (void)context;
    complain(name, "a disarmed timer ran");
}

static struct itimerspec every(double seconds)
{
    struct timespec length = {(time_t)seconds, (long)(fmod(seconds, 1) * 1e9)};
    return (struct itimerspec){length, length};
}

static timer_t make_timer(int number, int cookie, bool to_thread)
{
    timer_t timer;
    struct sigevent event = {.sigev_notify = to_thread ? SIGEV_THREAD_ID : SIGEV_SIGNAL, .sigev_signo = number};
    event.sigev_value.sival_int = cookie;
    if (to_thread)
        event.sigev_notify_thread_id = gettid();
    need(timer_create(CLOCK_MONOTONIC, &event, &timer), "timer_create");
    return timer;
}

static void arm(timer_t timer, double seconds)
{
    struct itimerspec period = every(seconds);
    need(timer_settime(timer, 0, &period, NULL), "timer_settime");
}

static int make_fd(double seconds)
{
    int made = (int)need(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK), "timerfd_create");
    struct itimerspec period = every(seconds);
    need(timerfd_settime(made, 0, &period, NULL), "timerfd_settime");
    return made;
}

static void set_interval_timer(int which, double seconds)
{
    struct timeval length = {0, (suseconds_t)(seconds * 1e6)};
    need(setitimer((__itimer_which_t)which, &(struct itimerval){length, length}, NULL), "setitimer");
}

static void set_up(void)
{
    owner = gettid();
    posix_timer = make_timer(SIG_TICK, COOKIE, false);
    disarmed_timer = make_timer(SIG_DISARMED, 0, false);
    thread_timer = make_timer(SIG_THREAD_TICK, THREAD_COOKIE, true);
    long_timer = make_timer(SIG_DISARMED, 0, false);
    struct itimerspec once = {.it_value = {LONG_SECONDS, 0}};
    long_end = seconds_of(CLOCK_MONOTONIC) + LONG_SECONDS;
    need(timer_settime(long_timer, 0, &once, NULL), "timer_settime");
    int numbers[] = {SIG_TICK, SIG_THREAD_TICK, SIG_DISARMED, SIGALRM, SIGVTALRM};
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
        unblock(numbers[i]);
    fd = make_fd(fd_ticks.interval);
    slow_fd = make_fd(slow_fd_ticks.interval);
    disarmed_fd = make_fd(0);
    arm(posix_timer, posix_ticks.interval);
    arm(thread_timer, thread_ticks.interval);
    set_interval_timer(ITIMER_REAL, real_ticks.interval);
    set_interval_timer(ITIMER_VIRTUAL, 0.020);
}

static void read_fd(int from, struct source *source)
{
    uint64_t count;
    ssize_t length = read(from, &count, sizeof count);
    if (length == sizeof count)
        source->ticks += count;
    else if (errno != EAGAIN)
        complain(name, "%s: read: %s", source->what, strerror(errno));
}

/* Ticks in this window against the time it took. A signal that was pending may count in the window after. */
static void account(struct source *source)
{
    double now = seconds_of(CLOCK_MONOTONIC);
    if (source->begin > 0) {
        double wanted = (now - source->begin) / source->interval;
        double got = (double)(source->ticks - source->counted);
        double slack = options.max_gap / source->interval + 4;
        if (got < wanted - slack || got > wanted + slack)
            complain(name, "%s: %.0f ticks instead of %.0f", source->what, got, wanted);
    }
    source->counted = source->ticks;
    source->begin = now;
}

/* Nothing left says nothing: at the instant when a period ends that is what the kernel tells. */
static void check_period(const char *what, struct itimerspec got, double interval)
{
    double period = (double)got.it_interval.tv_sec + (double)got.it_interval.tv_nsec / 1e9;
    double left = (double)got.it_value.tv_sec + (double)got.it_value.tv_nsec / 1e9;
    if (fabs(period - interval) > 1e-9 || left > interval + 1e-9)
        complain(name, "%s: period %.9f, left %.9f, instead of every %.9f", what, period, left, interval);
}

/* The time left says nothing: while its signal is pending an interval timer is not armed (getitimer tells 0). */
static void check_interval_timer(int which, const char *what)
{
    struct itimerval got;
    getitimer((__itimer_which_t)which, &got);
    if (got.it_interval.tv_sec != 0 || got.it_interval.tv_usec != 20000)
        complain(name, "%s: period %ld.%06ld", what, got.it_interval.tv_sec, got.it_interval.tv_usec);
}

static void check_settings(void)
{
    struct itimerspec got;
    timer_gettime(posix_timer, &got);
    check_period(posix_ticks.what, got, posix_ticks.interval);
    timer_gettime(thread_timer, &got);
    check_period(thread_ticks.what, got, thread_ticks.interval);
    timer_gettime(disarmed_timer, &got);
    check_period("disarmed POSIX timer", got, 0);
    timerfd_gettime(fd, &got);
    check_period(fd_ticks.what, got, fd_ticks.interval);
    timerfd_gettime(disarmed_fd, &got);
    check_period("disarmed timerfd", got, 0);
    check_interval_timer(ITIMER_REAL, real_ticks.what);
    check_interval_timer(ITIMER_VIRTUAL, "ITIMER_VIRTUAL");
    timer_gettime(long_timer, &got);
    double end = seconds_of(CLOCK_MONOTONIC) + (double)got.it_value.tv_sec + (double)got.it_value.tv_nsec / 1e9;
    if (fabs(end - long_end) > 0.25)
        complain(name, "a timer of an hour ends %.3f s off", end - long_end);
}

/* ITIMER_VIRTUAL counts time that this process spends computing, at the resolution of the scheduler's tick. */
static void check_virtual(void)
{
    static uint64_t before;
    static double used_before;
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    double used = (double)usage.ru_utime.tv_sec + (double)usage.ru_utime.tv_usec / 1e6;
    if (virtual_ticks != before || used < used_before) { /* processor time begins anew on another host */
        before = virtual_ticks;
        used_before = used;
    } else if (used - used_before > 3) {
        complain(name, "ITIMER_VIRTUAL: no tick in %.1f s of computing", used - used_before);
        used_before = used;
    }
}

static void account_all(void)
{
    read_fd(slow_fd, &slow_fd_ticks);
    struct source *sources[] = {&posix_ticks, &thread_ticks, &real_ticks, &fd_ticks, &slow_fd_ticks};
    for (size_t i = 0; i < sizeof sources / sizeof sources[0]; i++)
        account(sources[i]);
}

static void body(struct worker *self)
{
    set_up();
    double next = 0;
    while (lap(self)) {
        /* This thread's signals end the sleep early, as they should. */
        struct timespec length = {0, 30000000};
        nanosleep(&length, NULL);
        read_fd(fd, &fd_ticks);
        uint64_t count;
        if (read(disarmed_fd, &count, sizeof count) >= 0 || errno != EAGAIN)
            complain(name, "a disarmed timerfd ran");
        check_settings();
        check_virtual();
        if (seconds_of(CLOCK_MONOTONIC) > next) {
            account_all();
            next = seconds_of(CLOCK_MONOTONIC) + 1 + 2 * options.max_gap;
        }
    }
}

static void start(void)
{
    install(SIG_TICK, on_posix, SA_RESTART);
    install(SIG_THREAD_TICK, on_thread, SA_RESTART);
    install(SIG_DISARMED, on_disarmed, SA_RESTART);
    install(SIGALRM, on_alarm, SA_RESTART);
    install(SIGVTALRM, on_alarm, SA_RESTART);
    spawn(name, body, NULL);
}

static void damage_timer(void)
{
    arm(posix_timer, 0);
}

static void damage_timer_interval(void)
{
    set_interval_timer(ITIMER_REAL, 0);
}

static void damage_disarmed(void)
{
    arm(disarmed_timer, 0.001);
}

static void damage_timerfd(void)
{
    timerfd_settime(fd, 0, &(struct itimerspec){0}, NULL);
}

static const struct breaker breakers[] = {{"timer", damage_timer},
                                          {"itimer", damage_timer_interval},
                                          {"disarmed-timer", damage_disarmed},
                                          {"timerfd", damage_timerfd},
                                          {0}};
const struct checker timers_checker = {name, start, breakers};
