/* Signals: queued ones arrive all and in order, blocked ones stay pending, the alternate stack is used and kept,
 * actions and masks are what was installed. */
#define _GNU_SOURCE
#include "check.h"

#include <sys/syscall.h>
#include <sys/wait.h>

static const char name[] = "signals";
enum { BURST = 40, ALTSTACK = 65536, SIGNALS = 64 };

static struct {
    int received, wanted;
    bool directed;
} burst;
static uint64_t *altstack;
static volatile int altstack_runs;
static atomic_bool lose_one;

/* As the kernel has it, with the restorer that glibc hides. */
struct kernel_action {
    uint64_t handler, flags, restorer, mask;
};
static struct kernel_action actions[SIGNALS + 1];

static void check_value(int number, const siginfo_t *info)
{
    if (number != (burst.directed ? SIG_DIRECTED : SIG_QUEUED) || info->si_code != SI_QUEUE ||
        info->si_pid != getpid() || info->si_uid != getuid())
        complain(name, "queued signal %d: code %d, from %d", number, info->si_code, info->si_pid);
    expect(name, "order of queued signals", info->si_value.sival_int, burst.wanted + burst.received);
    burst.received++;
}

static void on_queued(int number, siginfo_t *info, void *context)
{
    (void)context;
    check_value(number, info);
}

static void on_altstack(int number, siginfo_t *info, void *context)
{
    (void)number, (void)info, (void)context;
    char here;
    if (&here < (char *)altstack || &here >= (char *)altstack + ALTSTACK)
        complain(name, "the handler does not run on the alternate stack");
    altstack_runs++;
}

/* Queue a burst while it is blocked, leave it for a while, let it in: all there, in order? */
static void send_burst(struct random *random, bool directed)
{
    int number = directed ? SIG_DIRECTED : SIG_QUEUED, first = (int)random_below(random, 1 << 30);
    burst.received = 0;
    burst.wanted = first;
    burst.directed = directed;
    bool yes = true;
    int count = atomic_compare_exchange_strong(&lose_one, &yes, false) ? BURST - 1 : BURST;
    for (int i = 0; i < count; i++) {
        union sigval value = {.sival_int = first + i};
        need(directed ? -pthread_sigqueue(pthread_self(), number, value) : sigqueue(getpid(), number, value),
             "sigqueue");
    }
    pause_ms(name, (double)random_below(random, 300));
    expect(name, "signals that came while blocked", burst.received, 0);
    sigset_t set, old;
    sigemptyset(&set);
    sigaddset(&set, number);
    pthread_sigmask(SIG_UNBLOCK, &set, &old); /* they arrive here */
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    expect(name, "queued signals that arrived", burst.received, BURST);
}

static void queue_kept(int value)
{
    need(sigqueue(getpid(), SIG_KEPT, (union sigval){.sival_int = value}), "sigqueue");
}

/* Two signals wait, blocked, for the whole life of the process: a standard one and a queued one with its value. */
static void check_kept(int *value)
{
    sigset_t pending;
    sigpending(&pending);
    if (!sigismember(&pending, SIGUSR2) || !sigismember(&pending, SIGURG) || !sigismember(&pending, SIG_KEPT))
        complain(name, "a blocked signal is no longer pending");
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIG_KEPT);
    siginfo_t info;
    if (sigtimedwait(&set, &info, &(struct timespec){0}) != SIG_KEPT) {
        complain(name, "the queued signal that was kept pending is gone: %s", strerror(errno));
    } else if (info.si_code != SI_QUEUE || info.si_value.sival_int != *value || info.si_pid != getpid()) {
        complain(name, "the kept signal: code %d, value %d instead of %d, from %d", info.si_code,
                 info.si_value.sival_int, *value, info.si_pid);
    }
    queue_kept(++*value);
}

static void set_altstack(void)
{
    altstack = aligned_alloc(PAGE, ALTSTACK);
    stack_t stack = {.ss_sp = altstack, .ss_size = ALTSTACK};
    need(sigaltstack(&stack, NULL), "sigaltstack");
    pattern_fill(altstack, PAGE, 77); /* the far end, which the handler never reaches */
}

static void check_altstack(int round)
{
    stack_t stack;
    sigaltstack(NULL, &stack);
    if (stack.ss_sp != altstack || stack.ss_size != ALTSTACK || stack.ss_flags != 0)
        complain(name, "alternate stack: %p, %zu, flags %x", stack.ss_sp, stack.ss_size, stack.ss_flags);
    if (pattern_check(altstack, PAGE, 77) >= 0)
        complain(name, "the far end of the alternate stack changed");
    pthread_kill(pthread_self(), SIG_ALTSTACK);
    expect(name, "runs of the handler on the alternate stack", altstack_runs, round);
}

static void read_actions(struct kernel_action *into)
{
    for (int number = 1; number <= SIGNALS; number++)
        need(syscall(SYS_rt_sigaction, number, NULL, &into[number], 8), "rt_sigaction");
}

static void check_actions(void)
{
    struct kernel_action now[SIGNALS + 1];
    read_actions(now);
    for (int number = 1; number <= SIGNALS; number++)
        if (memcmp(&now[number], &actions[number], sizeof now[number]) != 0)
            complain(name, "action of signal %d changed: handler %lx flags %lx mask %lx", number, now[number].handler,
                     now[number].flags, now[number].mask);
}

static void check_mask(const sigset_t *wanted)
{
    uint64_t now = 0;
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, NULL, &now, 8);
    expect(name, "signal mask", (long)now, *(const long *)wanted);
}

static void body(struct worker *self)
{
    struct random random = {4711};
    set_altstack();
    unblock(SIG_ALTSTACK);
    sigset_t mask;
    pthread_sigmask(SIG_SETMASK, NULL, &mask);
    int kept = 100;
    queue_kept(kept);
    kill(getpid(), SIGUSR2);
    pthread_kill(pthread_self(), SIGURG);
    for (int round = 1; lap(self); round++) {
        send_burst(&random, round % 2);
        check_kept(&kept);
        check_altstack(round);
        check_actions();
        check_mask(&mask);
    }
}

/* Signals of this process that stay unused keep a disposition of their own kind: ignored, default, handled. */
static void start(void)
{
    install(SIG_QUEUED, on_queued, 0);
    install(SIG_DIRECTED, on_queued, SA_NODEFER);
    install(SIG_ALTSTACK, on_altstack, SA_ONSTACK);
    install(SIGPROF, on_queued, SA_RESETHAND);
    install(SIGCHLD, on_queued, SA_NOCLDSTOP | SA_NOCLDWAIT);
    signal(SIGPIPE, SIG_IGN);
    read_actions(actions); /* this checker starts last: every other one has installed its handlers */
    spawn(name, body, NULL);
}

static void damage_signal(void)
{
    lose_one = true;
}

static void damage_handler(void)
{
    signal(SIGPIPE, SIG_DFL);
}

static void damage_pending(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    sigtimedwait(&set, NULL, &(struct timespec){0});
}

static const struct breaker breakers[] = {
    {"signal", damage_signal}, {"handler", damage_handler}, {"pending", damage_pending}, {0}};
const struct checker signals_checker = {name, start, breakers};
