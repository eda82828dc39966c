/* Random changes of an address space, with a model of what every page must contain kept elsewhere in memory.
 *
 * Each thread owns an arena, a range of addresses that is its alone, and does to it in random order all that a program
 * may do: map (anonymous, file), unmap parts, move and resize mappings, drop pages, change protections, map anew where
 * something else was, ask for huge pages. The main thread moves the program break and grows its stack. After each
 * operation some random pages are compared with the model; on SIGUSR1 and at the end, all of them.
 */
#define _GNU_SOURCE
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "arena.h"

enum { STACK_PAGES = 1024, BREAK_PAGES = 4096, THREADS_MAX = 8 };

static struct {
    uint64_t seed;
    double seconds, rate; /* rate: bytes per second, of all threads together */
    size_t megabytes;
    int threads;
    const char *status, *log, *directory;
    double break_after;
} options = {.seed = 1, .rate = 30e6, .megabytes = 64, .threads = 2, .directory = "."};

static struct arena arenas[THREADS_MAX];
static atomic_bool stopping;
static atomic_int check_requests;

static void sleep_ms(long ms)
{
    nanosleep(&(struct timespec){0, ms * 1000000}, NULL);
}

static void *run(void *argument)
{
    struct arena *arena = argument;
    double begin = seconds_of(CLOCK_MONOTONIC);
    int checked = 0;
    while (!stopping) {
        arena_step(arena);
        if (checked != check_requests) {
            checked = check_requests;
            arena_check(arena);
        }
        while (!stopping && (double)arena->written * options.threads >
                                options.rate * (seconds_of(CLOCK_MONOTONIC) - begin + 0.01))
            sleep_ms(2);
    }
    arena_check(arena);
    return NULL;
}

/* ---- the main thread: its stack and the program break */
static struct random main_random;
static counter_t *stack_depth, *break_pages;

static void __attribute__((noinline)) grow_stack(size_t depth, uint64_t seed)
{
    uint64_t frame[PAGE / 8];
    pattern_fill(frame, sizeof frame, seed);
    __asm__ volatile("" : : "r"(frame) : "memory");
    if (depth > 1)
        grow_stack(depth - 1, mix(seed));
    else
        sleep_ms(20); /* deep in the stack for a while */
    if (pattern_check(frame, sizeof frame, seed) >= 0)
        complain("churn", "a stack frame at %p changed", (void *)frame);
}

static char *break_start;
static size_t break_now;
static uint32_t break_generation[BREAK_PAGES];

static uint64_t break_seed(size_t at)
{
    return break_generation[at] ? mix(at << 20 ^ break_generation[at]) | 1 : 0;
}

/* What was given back and taken again is zeros. Nothing else moves the break: see main(). */
static void move_break(void)
{
    size_t wanted = random_below(&main_random, BREAK_PAGES);
    if (sbrk(0) != break_start + break_now * PAGE)
        complain("churn", "the program break is %p", sbrk(0));
    for (size_t at = 0; at < break_now; at += 1 + random_below(&main_random, 16))
        if (pattern_check(break_start + at * PAGE, PAGE, break_seed(at)) >= 0)
            complain("churn", "page %zu of the brk heap changed", at);
    if (brk(break_start + wanted * PAGE) < 0)
        return;
    for (size_t at = break_now; at < wanted; at++)
        break_generation[at] = 0;
    break_now = wanted;
    for (int i = 0; i < 16 && wanted; i++) {
        size_t at = random_below(&main_random, wanted);
        break_generation[at]++;
        pattern_fill(break_start + at * PAGE, PAGE, break_seed(at));
    }
    *break_pages = wanted;
}

static void on_fault(int number, siginfo_t *info, void *context)
{
    (void)context;
    complain("churn", "signal %d at %p", number, info->si_addr);
    for (int i = 0; i < options.threads; i++)
        arena_explain(&arenas[i], info->si_addr);
    status_finish();
    _exit(1);
}

static void usage(void)
{
    fputs("usage: churn [--seed N] [--seconds S] [--megabytes M] [--rate MB/s] [--threads N] [--dir DIR]\n"
          "             [--status FILE] [--log FILE] [--skip OPERATION,…] [--break-after S]\n"
          "SIGUSR1 checks every page; SIGTERM checks and ends: 0 means no complaint.\n",
          stderr);
    exit(2);
}

static void parse(int count, char **arguments)
{
    static const struct option known[] = {{"seed", 1, 0, 's'},    {"seconds", 1, 0, 'e'}, {"megabytes", 1, 0, 'm'},
                                          {"rate", 1, 0, 'r'},    {"threads", 1, 0, 't'}, {"dir", 1, 0, 'd'},
                                          {"status", 1, 0, 'f'},  {"log", 1, 0, 'l'},     {"break-after", 1, 0, 'b'},
                                          {"skip", 1, 0, 'k'},
                                          {0}};
    for (int option; (option = getopt_long(count, arguments, "", known, NULL)) != -1;)
        switch (option) {
        case 's': options.seed = strtoull(optarg, NULL, 0); break;
        case 'e': options.seconds = atof(optarg); break;
        case 'm': options.megabytes = strtoul(optarg, NULL, 0); break;
        case 'r': options.rate = atof(optarg) * 1e6; break;
        case 't': options.threads = atoi(optarg); break;
        case 'd': options.directory = optarg; break;
        case 'f': options.status = optarg; break;
        case 'l': options.log = optarg; break;
        case 'b': options.break_after = atof(optarg); break;
        case 'k':
            if (!arena_skip(optarg))
                usage();
            break;
        default: usage();
        }
    if (optind != count || options.threads < 1 || options.threads > THREADS_MAX || options.megabytes < 8)
        usage();
}

static void attend(const sigset_t *wanted)
{
    double begin = seconds_of(CLOCK_MONOTONIC);
    bool whole = options.break_after <= 0;
    for (;;) {
        int number = sigtimedwait(wanted, NULL, &(struct timespec){0, 50000000});
        double now = seconds_of(CLOCK_MONOTONIC) - begin;
        if (number == SIGTERM || number == SIGINT || (options.seconds > 0 && now > options.seconds))
            return;
        if (number == SIGUSR1)
            check_requests++;
        if (!whole && now > options.break_after) {
            arena_damage(&arenas[0]);
            check_requests++;
            whole = true;
        }
        size_t depth = 1 + random_below(&main_random, STACK_PAGES);
        *stack_depth = depth;
        grow_stack(depth, random_next(&main_random));
        move_break();
        status_write();
    }
}

int main(int count, char **arguments)
{
    parse(count, arguments);
    mkdir(options.directory, 0755);
    status_open("churn", options.status, options.log);
    sigset_t wanted;
    sigemptyset(&wanted);
    sigaddset(&wanted, SIGTERM);
    sigaddset(&wanted, SIGINT);
    sigaddset(&wanted, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &wanted, NULL);
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
    int file = arena_make_file(options.directory);
    main_random.state = options.seed;
    stack_depth = status_counter("stack-depth");
    break_pages = status_counter("break-pages");
    for (int i = 0; i < options.threads; i++)
        arena_make(&arenas[i], i, 2 * options.megabytes * 256 / (size_t)options.threads, options.seed, file);
    heartbeat_start(1000);
    for (int i = 0; i < options.threads; i++)
        pthread_create(&arenas[i].thread, NULL, run, &arenas[i]);
    /* From here on nothing in this thread allocates, so the break is ours. */
    break_start = sbrk(0);
    break_start += (PAGE - (uintptr_t)break_start % PAGE) % PAGE;
    brk(break_start);
    attend(&wanted);
    stopping = true;
    for (int i = 0; i < options.threads; i++)
        pthread_join(arenas[i].thread, NULL);
    brk(break_start);
    return status_finish();
}
