/* The self-checking program: one process, a room per checker, each of which notices when its own kind of state is
 * not what it was: one wrong byte, one lost signal, one clock step back.
 *
 * A checker is a `struct checker` with a function that starts its threads. A thread is a loop `while (lap(self))`;
 * one that makes no lap for long is a complaint too ("stands still"), which is how a lost wake-up shows.
 * Every thread starts with all signals blocked and unblocks only what it handles itself, so that a system call that
 * is interrupted in any other thread has no excuse.
 *
 * Each checker also lists breakers: deliberate damage (`--break-after SECONDS KIND`) that it must notice.
 */
#pragma once

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "../common/pattern.h"
#include "../common/status.h"

struct options {
    const char *directory; /* on a file system that every host sees: the files that stay open */
    const char *fifo;
    int threads; /* of the register checker */
    int megabytes;
    double max_gap; /* seconds that a clock, a sleep or a timer may be late */
};
extern struct options options;

struct worker {
    char name[24];
    int index;
    counter_t *laps;
    uint64_t seen; /* the watchdog's: laps when it last looked, and when they last changed */
    double since;
    void (*body)(struct worker *self);
    void *argument;
    pthread_t thread;
    bool forever;
};

struct breaker {
    const char *kind;
    void (*damage)(void);
};

struct checker {
    const char *name;
    void (*start)(void);
    const struct breaker *breakers; /* ends with kind NULL */
};

extern const struct checker registers_checker, tls_checker, timers_checker, signals_checker, pipes_checker,
    epoll_checker, clocks_checker, heap_checker, files_checker, sleepers_checker, locks_checker, identity_checker;

/* Start a watched thread, which ends when lap() says so. */
struct worker *spawn(const char *name, void (*body)(struct worker *), void *argument);
/* Start a thread that sits in one system call for ever. */
struct worker *spawn_forever(const char *name, void (*body)(struct worker *), void *argument);
/* One turn of a thread's loop is done; false when it is time to end. */
bool lap(struct worker *self);

/* The real-time signals and what they are for. */
#define SIG_TICK (SIGRTMIN + 1)        /* POSIX timer, to the process */
#define SIG_THREAD_TICK (SIGRTMIN + 2) /* POSIX timer, to a thread */
#define SIG_DISARMED (SIGRTMIN + 3)    /* of a timer that must not run */
#define SIG_QUEUED (SIGRTMIN + 4)      /* queued to the process while blocked */
#define SIG_DIRECTED (SIGRTMIN + 5)    /* queued to a thread while blocked */
#define SIG_ALTSTACK (SIGRTMIN + 6)    /* handled on the alternate stack */
#define SIG_FD (SIGRTMIN + 7)          /* read from a signalfd */
#define SIG_KEPT (SIGRTMIN + 8)        /* kept pending */
#define SIG_POKE (SIGRTMIN + 9)        /* interrupts a sleep, and is counted */
#define SIG_STRAY (SIGRTMIN + 10)      /* interrupts a sleep, and is not: damage */

void install(int number, void (*handler)(int, siginfo_t *, void *), int flags);
void unblock(int number);
/* Sleep; being woken early is a complaint of `checker`. */
void pause_ms(const char *checker, double ms);
/* A call that the program cannot do without; a failure ends the program. */
long need(long result, const char *what);
/* What a call must answer; a complaint otherwise. */
bool expect(const char *checker, const char *what, long got, long wanted);
