#define _GNU_SOURCE
#include "load.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#include "pattern.h"

enum { STACK = 64 * 1024, RECORDS = 1 << 15, RECORD_MS = 10, EVENTS = 64, MESSAGE = 4096 };

static counter_t *wakeups, *work, *echoed;

static void die(const char *what)
{
    perror(what);
    exit(2);
}

static void start(void *(*run)(void *), void *argument)
{
    pthread_attr_t attributes;
    pthread_t thread;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK);
    errno = pthread_create(&thread, &attributes, run, argument);
    if (errno)
        die("pthread_create");
    pthread_attr_destroy(&attributes);
}

/* --- sleepers --- */

static _Thread_local uint64_t identity; /* in thread-local storage: found by the register that a move has to keep */

static void wait_in(int way)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    struct timespec second = {1, 0}, end;
    switch (way) {
    case 0: nanosleep(&second, NULL); break;
    case 1: poll(NULL, 0, 1000); break;
    default: { /* a futex that nobody wakes */
        pthread_cond_t never = PTHREAD_COND_INITIALIZER;
        clock_gettime(CLOCK_REALTIME, &end);
        end.tv_sec++;
        pthread_mutex_lock(&lock);
        pthread_cond_timedwait(&never, &lock, &end);
        pthread_mutex_unlock(&lock);
    }
    }
}

static void *sleep_and_check(void *argument)
{
    uint64_t number = (uint64_t)argument, on_stack = mix(number);
    identity = number;
    for (;;) {
        wait_in((int)(number % 3));
        if (identity != number || on_stack != mix(number))
            complain("sleeper", "thread %lu is not itself: %lu", number, identity);
        atomic_fetch_add(wakeups, 1);
    }
    return NULL;
}

void sleepers_start(int count)
{
    wakeups = status_counter("wakeups");
    for (int i = 0; i < count; i++)
        start(sleep_and_check, (void *)(uintptr_t)(i + 1));
}

/* --- computing --- */

static uint64_t compute(volatile uint64_t *from)
{
    uint64_t value = *from;
    for (int i = 0; i < 1000; i++)
        value = mix(value);
    return value;
}

static void *spin(void *argument)
{
    volatile uint64_t zero = 0;
    uint64_t expected = compute(&zero);
    (void)argument;
    for (;;) {
        if (compute(&zero) != expected)
            complain("spin", "computed something else");
        atomic_fetch_add(work, 1);
    }
    return NULL;
}

void spin_start(void)
{
    work = status_counter("work");
    start(spin, NULL);
}

/* --- the echo server --- */

struct server {
    int listener, epoll;
};

static void watch(int epoll, int fd)
{
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) < 0)
        complain("echo", "epoll_ctl: %s", strerror(errno));
}

static void accept_all(const struct server *server)
{
    int fd;
    while ((fd = accept4(server->listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0)
        watch(server->epoll, fd);
    if (errno != EAGAIN)
        complain("echo", "accept: %s", strerror(errno));
}

static void echo(int fd)
{
    char message[MESSAGE];
    ssize_t length = read(fd, message, sizeof message);
    if (length > 0) {
        if (write(fd, message, (size_t)length) != length)
            complain("echo", "write: %s", strerror(errno));
        atomic_fetch_add(echoed, 1);
        return;
    }
    if (length < 0 && errno == EAGAIN)
        return;
    if (length < 0 && errno != ECONNRESET) /* how a client goes that did not wait for an answer */
        complain("echo", "read: %s", strerror(errno));
    close(fd);
}

static void *serve(void *argument)
{
    const struct server *server = argument;
    struct epoll_event ready[EVENTS];
    for (;;) {
        int count = epoll_wait(server->epoll, ready, EVENTS, -1);
        for (int i = 0; i < count; i++)
            if (ready[i].data.fd == server->listener)
                accept_all(server);
            else
                echo(ready[i].data.fd);
    }
    return NULL;
}

static struct sockaddr_in address_of(const char *place)
{
    struct sockaddr_in address = {.sin_family = AF_INET};
    char host[64];
    unsigned port;
    if (sscanf(place, "%63[^:]:%u", host, &port) != 2 || inet_pton(AF_INET, host, &address.sin_addr) != 1) {
        fprintf(stderr, "not ADDRESS:PORT: %s\n", place);
        exit(2);
    }
    address.sin_port = htons((uint16_t)port);
    return address;
}

static void allow_descriptors(void)
{
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
}

void echo_start(const char *place)
{
    static struct server server;
    struct sockaddr_in address = address_of(place);
    allow_descriptors();
    echoed = status_counter("echoed");
    server.listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    server.epoll = epoll_create1(EPOLL_CLOEXEC);
    setsockopt(server.listener, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
    if (bind(server.listener, (struct sockaddr *)&address, sizeof address) < 0 || listen(server.listener, 4096) < 0)
        die(place);
    watch(server.epoll, server.listener);
    start(serve, &server);
}

/* --- the trace --- */

struct record {
    double at, gap_ms;
    uint64_t pages, work;
    char host[16];
};

static struct record trace[RECORDS];
static _Atomic size_t records;
static const counter_t *pages_written;

static void keep(double now, double gap_ms, const char *host)
{
    struct record *record = &trace[records % RECORDS];
    *record = (struct record){now, gap_ms, *pages_written, work ? *work : 0, ""};
    snprintf(record->host, sizeof record->host, "%.15s", host);
    records++;
}

/* Where the host changes a record ends: its gap is the one with the move in it. */
static void *beat_and_trace(void *argument)
{
    double last = seconds_of(CLOCK_REALTIME), kept = last, longest = 0;
    struct utsname here, before;
    (void)argument;
    uname(&before);
    prctl(PR_SET_TIMERSLACK, 1);
    for (;;) {
        heartbeat();
        double now = seconds_of(CLOCK_REALTIME), gap = (now - last) * 1e3;
        uname(&here);
        bool moved = strcmp(here.nodename, before.nodename) != 0;
        longest = moved || gap > longest ? gap : longest;
        if (moved || now - kept > RECORD_MS / 1e3) {
            keep(now, longest, here.nodename);
            kept = now;
            longest = 0;
        }
        last = now;
        before = here;
        nanosleep(&(struct timespec){0, 100000}, NULL);
    }
    return NULL;
}

void trace_start(const counter_t *pages)
{
    pages_written = pages;
    start(beat_and_trace, NULL);
}

void trace_write(const char *path)
{
    FILE *file = fopen(path, "we");
    size_t end = records;
    if (!file)
        die(path);
    for (size_t i = end > RECORDS ? end - RECORDS : 0; i < end; i++) {
        const struct record *record = &trace[i % RECORDS];
        fprintf(file, "%.6f %lu %lu %.3f %s\n", record->at, record->pages, record->work, record->gap_ms, record->host);
    }
    if (fclose(file) != 0)
        die(path);
}
