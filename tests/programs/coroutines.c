/* One thread on many small stacks, as with goroutines: each is nearly full, and below it is memory of somebody else.
 *
 * Every coroutine keeps a pattern in all of its stack but what it needs to switch, waits, spins, and checks the pattern,
 * its signal mask and its floating-point control word. Below each stack is a page without access, or what another one keeps there.
 * Signals come all the time, on an alternate stack. SIGTERM ends: 0 means no complaint. */
#define _GNU_SOURCE
#include <fenv.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <ucontext.h>
#include <unistd.h>

#include "common/status.h"

enum { COROUTINES = 24, STACK = 16384, GUARD = 4096, OWN = STACK - GUARD - 2560, FOREIGN = 0xa5 };

static ucontext_t main_context, contexts[COROUTINES];
static counter_t *laps, *signals;
static atomic_bool stopping;
static unsigned char *below[COROUTINES];
static struct {
    const char *what; /* NULL: nothing */
    long where, value;
} finding; /* complaining takes more stack than a coroutine has */
static int waits; /* which wait a lap makes */

/* Without a library's frame on the stack, and so that no register but those that the kernel may change does. */
static long call(long number, long a, long b, long c, long d)
{
    register long r10 __asm__("r10") = d;
    __asm__ volatile("syscall" : "+a"(number) : "D"(a), "S"(b), "d"(c), "r"(r10) : "rcx", "r11", "memory");
    return number;
}

static void wait_somehow(int which)
{
    struct timespec time = {0, 300000};
    switch (which % 4) {
    case 0: call(SYS_nanosleep, (long)&time, 0, 0, 0); break;
    case 1: call(SYS_poll, 0, 0, 1, 0); break;
    case 2: call(SYS_ppoll, 0, 0, (long)&time, 0); break;
    default:
        for (volatile long n = 0; n < 100000; n++)
            ;
    }
}

static void found(const char *what, long where, long value)
{
    finding.what = what;
    finding.where = where;
    finding.value = value;
}

static void check_mask(void)
{
    uint64_t mask = 0;
    call(SYS_rt_sigprocmask, SIG_BLOCK, 0, (long)&mask, sizeof mask);
    if (mask != 1ull << (SIGUSR2 - 1))
        found("signal mask", 0, (long)mask);
}

static void body(int self)
{
    volatile unsigned char own[OWN];
    int rounding[] = {FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};
    for (unsigned char turn = 0;; turn++) {
        fesetround(rounding[self % 4]);
        for (int n = 0; n < OWN; n++)
            own[n] = (unsigned char)(self * 31 + n * 7 + turn);
        wait_somehow(waits);
        for (int n = 0; n < OWN; n++)
            if (own[n] != (unsigned char)(self * 31 + n * 7 + turn)) {
                found("byte of its stack", n, own[n]);
                break;
            }
        if (fegetround() != rounding[self % 4])
            found("rounding mode", 0, fegetround());
        check_mask();
        atomic_fetch_add(laps, 1);
        swapcontext(&contexts[self], &main_context);
    }
}

static void on_signal(int number)
{
    if (number == SIGTERM)
        stopping = true;
    atomic_fetch_add(signals, 1);
}

static void start_signals(void)
{
    static char alternate[65536];
    stack_t stack = {.ss_sp = alternate, .ss_size = sizeof alternate};
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK | SA_RESTART};
    struct itimerval often = {{0, 1700}, {0, 1700}};
    sigset_t blocked;
    sigaltstack(&stack, NULL);
    sigaction(SIGALRM, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGUSR2);
    sigprocmask(SIG_SETMASK, &blocked, NULL);
    setitimer(ITIMER_REAL, &often, NULL);
}

static void make_stacks(void)
{
    char *room = mmap(NULL, COROUTINES * (size_t)STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED) {
        perror("mmap");
        exit(2);
    }
    for (int n = 0; n < COROUTINES; n++) {
        char *stack = room + n * (size_t)STACK;
        below[n] = (unsigned char *)stack;
        memset(stack, FOREIGN, GUARD);
        if (n % 2 == 0 && mprotect(stack, GUARD, PROT_NONE) < 0)
            perror("mprotect");
        getcontext(&contexts[n]);
        contexts[n].uc_stack = (stack_t){.ss_sp = stack, .ss_size = STACK};
        contexts[n].uc_link = NULL;
        makecontext(&contexts[n], (void (*)(void))body, 1, n);
    }
}

/* What is below the stacks without a guard is not theirs. */
static void check_neighbours(void)
{
    for (int n = 1; n < COROUTINES; n += 2)
        for (int i = 0; i < GUARD; i++)
            if (below[n][i] != FOREIGN) {
                complain("coroutines", "byte %d below stack %d is %d", i, n, below[n][i]);
                below[n][i] = FOREIGN;
            }
}

int main(int count, char **arguments)
{
    const char *status = NULL, *log = NULL;
    static const struct option known[] = {{"status", 1, 0, 's'}, {"log", 1, 0, 'l'}, {0}};
    for (int option; (option = getopt_long(count, arguments, "", known, NULL)) != -1;)
        switch (option) {
        case 's': status = optarg; break;
        case 'l': log = optarg; break;
        default: return 2;
        }
    status_open("coroutines", status, log);
    laps = status_counter("laps");
    signals = status_counter("signals");
    start_signals();
    make_stacks();
    for (int round = 0; !stopping; round++) {
        waits = round;
        for (int n = 0; n < COROUTINES; n++) {
            swapcontext(&main_context, &contexts[n]);
            if (finding.what)
                complain("coroutines", "coroutine %d: %s %ld: %lx", n, finding.what, finding.where, finding.value);
            finding.what = NULL;
        }
        check_neighbours();
        status_write();
    }
    return status_finish();
}
