#define _GNU_SOURCE
#include "check.h"

#include <getopt.h>
#include <math.h>
#include <sys/stat.h>

struct options options = {.directory = ".", .threads = 8, .megabytes = 32, .max_gap = 2.0};

static const struct checker *const checkers[] = {
    &registers_checker, &tls_checker,   &timers_checker,   &pipes_checker, &epoll_checker,    &clocks_checker,
    &heap_checker,      &files_checker, &sleepers_checker, &locks_checker, &identity_checker, &signals_checker,
};
enum { CHECKERS = sizeof checkers / sizeof checkers[0], WORKERS = 96 };

static struct worker workers[WORKERS];
static int worker_count;
static atomic_bool stopping;

long need(long result, const char *what)
{
    if (result < 0) {
        fprintf(stderr, "selfcheck: %s: %s\n", what, strerror(errno));
        exit(2);
    }
    return result;
}

bool expect(const char *checker, const char *what, long got, long wanted)
{
    int error = errno;
    if (got == wanted)
        return true;
    complain(checker, "%s: %ld (0x%lx) instead of %ld (0x%lx)%s%s", what, got, got, wanted, wanted,
             got == -1 ? ", " : "", got == -1 ? strerror(error) : "");
    return false;
}

void install(int number, void (*handler)(int, siginfo_t *, void *), int flags)
{
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | flags};
    sigfillset(&action.sa_mask);
    need(sigaction(number, &action, NULL), "sigaction");
}

void unblock(int number)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, number);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
}

void pause_ms(const char *checker, double ms)
{
    struct timespec length = {(time_t)(ms / 1e3), (long)(fmod(ms, 1e3) * 1e6)};
    expect(checker, "nanosleep", nanosleep(&length, NULL), 0);
}

static void *run(void *argument)
{
    struct worker *self = argument;
    self->body(self);
    return NULL;
}

static struct worker *start(const char *name, void (*body)(struct worker *), void *argument, bool forever)
{
    if (worker_count == WORKERS)
        abort();
    struct worker *worker = &workers[worker_count];
    *worker = (struct worker){.index = worker_count++, .body = body, .argument = argument, .forever = forever};
    snprintf(worker->name, sizeof worker->name, "%s", name);
    worker->laps = forever ? NULL : status_counter(name);
    worker->since = seconds_of(CLOCK_MONOTONIC);
    need(-pthread_create(&worker->thread, NULL, run, worker), "pthread_create");
    return worker;
}

struct worker *spawn(const char *name, void (*body)(struct worker *), void *argument)
{
    return start(name, body, argument, false);
}

struct worker *spawn_forever(const char *name, void (*body)(struct worker *), void *argument)
{
    return start(name, body, argument, true);
}

bool lap(struct worker *self)
{
    atomic_fetch_add(self->laps, 1);
    return !stopping;
}

/* A thread may be late by a pause and a busy machine; one that is later than this waits for something lost. */
static void watch(void)
{
    double now = seconds_of(CLOCK_MONOTONIC), limit = 15 + options.max_gap;
    for (struct worker *worker = workers; worker < workers + worker_count; worker++) {
        if (worker->forever)
            continue;
        if (*worker->laps != worker->seen) {
            worker->seen = *worker->laps;
            worker->since = now;
        } else if (now - worker->since > limit) {
            complain(worker->name, "stands still since %.1f s", now - worker->since);
            worker->since = now;
        }
    }
}

static void join_all(void)
{
    stopping = true;
    struct timespec deadline;
    clock_gettime(CLOCK_REALTIME, &deadline);
    deadline.tv_sec += 15 + (time_t)options.max_gap;
    for (struct worker *worker = workers; worker < workers + worker_count; worker++)
        if (!worker->forever && pthread_timedjoin_np(worker->thread, NULL, &deadline) != 0)
            complain(worker->name, "does not end");
}

static const struct breaker *find_breaker(const char *kind)
{
    for (int i = 0; i < CHECKERS; i++)
        for (const struct breaker *breaker = checkers[i]->breakers; breaker->kind; breaker++)
            if (strcmp(breaker->kind, kind) == 0)
                return breaker;
    fprintf(stderr, "selfcheck: cannot break '%s'; see --list-breaks\n", kind);
    exit(2);
}

static void list_breakers(void)
{
    for (int i = 0; i < CHECKERS; i++)
        for (const struct breaker *breaker = checkers[i]->breakers; breaker->kind; breaker++)
            puts(breaker->kind);
    exit(0);
}

static void usage(void)
{
    fputs("usage: selfcheck [--dir DIR] [--status FILE] [--log FILE] [--fifo FILE] [--threads N]\n"
          "                 [--megabytes N] [--seconds S] [--max-gap S] [--break-after S KIND | --list-breaks]\n"
          "                 [--interruptible]\n"
          "--interruptible: the first thread's sigtimedwait may fail with EINTR, as after SIGSTOP and SIGCONT.\n"
          "SIGUSR1 prints the status and starts a new window for the longest gap; SIGTERM ends: 0 means no complaint.\n",
          stderr);
    exit(2);
}

struct plan {
    double seconds, break_after;
    const struct breaker *breaker;
    const char *status, *log;
    bool interruptible;
};

static void parse(int count, char **arguments, struct plan *plan)
{
    static const struct option known[] = {
        {"dir", 1, 0, 'd'},       {"status", 1, 0, 's'},  {"log", 1, 0, 'l'},     {"fifo", 1, 0, 'f'},
        {"threads", 1, 0, 't'},   {"seconds", 1, 0, 'e'}, {"max-gap", 1, 0, 'g'}, {"break-after", 1, 0, 'b'},
        {"megabytes", 1, 0, 'm'}, {"list-breaks", 0, 0, 'L'}, {"interruptible", 0, 0, 'i'}, {0},
    };
    for (int option; (option = getopt_long(count, arguments, "", known, NULL)) != -1;)
        switch (option) {
        case 'd': options.directory = optarg; break;
        case 's': plan->status = optarg; break;
        case 'l': plan->log = optarg; break;
        case 'f': options.fifo = optarg; break;
        case 't': options.threads = atoi(optarg); break;
        case 'm': options.megabytes = atoi(optarg); break;
        case 'e': plan->seconds = atof(optarg); break;
        case 'g': options.max_gap = atof(optarg); break;
        case 'b':
            plan->break_after = atof(optarg);
            if (optind == count)
                usage();
            plan->breaker = find_breaker(arguments[optind++]);
            break;
        case 'L': list_breakers(); break;
        case 'i': plan->interruptible = true; break;
        default: usage();
        }
    if (optind != count || options.threads < 1 || options.threads > 32 || options.megabytes < 8)
        usage();
}

/* Every 200 ms: the status, the watchdog, the damage when its time has come. Until told to stop. */
static void attend(const struct plan *plan)
{
    sigset_t wanted;
    sigemptyset(&wanted);
    sigaddset(&wanted, SIGTERM);
    sigaddset(&wanted, SIGINT);
    sigaddset(&wanted, SIGUSR1);
    double begin = seconds_of(CLOCK_MONOTONIC);
    const struct breaker *breaker = plan->breaker;
    for (;;) {
        int number = sigtimedwait(&wanted, NULL, &(struct timespec){0, 200000000});
        double now = seconds_of(CLOCK_MONOTONIC);
        if (number == SIGTERM || number == SIGINT || (plan->seconds > 0 && now - begin > plan->seconds))
            return;
        if (number < 0 && errno != EAGAIN && !(errno == EINTR && plan->interruptible))
            complain("main", "sigtimedwait: %s", strerror(errno));
        if (number == SIGUSR1) {
            status_finish();
            heartbeat_new_window();
        }
        if (breaker && now - begin > plan->break_after) {
            breaker->damage();
            breaker = NULL;
        }
        watch();
        status_write();
    }
}

int main(int count, char **arguments)
{
    struct plan plan = {0};
    parse(count, arguments, &plan);
    mkdir(options.directory, 0755);
    status_open("selfcheck", plan.status, plan.log);
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, NULL);
    for (int i = 0; i < CHECKERS; i++)
        checkers[i]->start();
    attend(&plan);
    join_all();
    /* The threads that sit in a call for ever end with the process. */
    _exit(status_finish());
}
