#include "status.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

enum { LOGGED_COMPLAINTS = 200 };

struct gap {
    double at, ms;
};

static struct {
    const char *program;
    int file, log;
    uint64_t sequence;
    counter_t complaints;
    char first[240];
    int counters;
    struct {
        char name[32];
        counter_t value;
    } counter[STATUS_COUNTERS];
} status = {.file = -1, .log = STDERR_FILENO};

/* Written by the thread that beats, read by the one that writes the status: a torn value would be a wrong report. */
static struct {
    pthread_mutex_t lock;
    double last;
    struct gap longest;
    uint64_t over_5ms;
    struct gap recent[STATUS_GAPS];
} beats = {.lock = PTHREAD_MUTEX_INITIALIZER};

static pthread_mutex_t complaint_lock = PTHREAD_MUTEX_INITIALIZER;

double seconds_of(int clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static int open_or_die(const char *path, int flags)
{
    int fd = open(path, flags | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0) {
        perror(path);
        exit(2);
    }
    return fd;
}

void status_open(const char *program, const char *path, const char *log)
{
    status.program = program;
    if (path)
        status.file = open_or_die(path, O_RDWR | O_TRUNC);
    if (log)
        status.log = open_or_die(log, O_WRONLY | O_APPEND);
}

counter_t *status_counter(const char *name)
{
    if (status.counters == STATUS_COUNTERS) {
        fprintf(stderr, "more than %d counters\n", STATUS_COUNTERS);
        abort();
    }
    snprintf(status.counter[status.counters].name, sizeof status.counter[0].name, "%s", name);
    return &status.counter[status.counters++].value;
}

uint64_t complaints(void)
{
    return status.complaints;
}

/* Text that is put between quotes in the JSON. */
static void keep_printable(char *text)
{
    for (; *text; text++)
        if (*text == '"' || *text == '\\' || *text < ' ')
            *text = '\'';
}

void complain(const char *checker, const char *format, ...)
{
    char text[200], line[400];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    keep_printable(text);
    pthread_mutex_lock(&complaint_lock);
    uint64_t before = atomic_fetch_add(&status.complaints, 1);
    if (before == 0)
        snprintf(status.first, sizeof status.first, "%s: %s", checker, text);
    pthread_mutex_unlock(&complaint_lock);
    if (before >= LOGGED_COMPLAINTS)
        return;
    int length = snprintf(line, sizeof line, "COMPLAINT: %.6f %s: %s\n", seconds_of(CLOCK_REALTIME), checker, text);
    if (write(status.log, line, (size_t)length) < 0)
        abort();
}

void heartbeat(void)
{
    double now = seconds_of(CLOCK_REALTIME);
    struct gap gap = {now, beats.last > 0 ? (now - beats.last) * 1e3 : 0};
    beats.last = now;
    if (gap.ms <= beats.longest.ms && gap.ms <= 5)
        return;
    pthread_mutex_lock(&beats.lock);
    if (gap.ms > beats.longest.ms)
        beats.longest = gap;
    if (gap.ms > 5)
        beats.recent[beats.over_5ms++ % STATUS_GAPS] = gap;
    pthread_mutex_unlock(&beats.lock);
}

static void *beat(void *argument)
{
    const struct timespec interval = {0, (long)argument * 1000};
    prctl(PR_SET_TIMERSLACK, 1);
    for (;;) {
        heartbeat();
        nanosleep(&interval, NULL);
    }
    return NULL;
}

void heartbeat_start(long microseconds)
{
    pthread_t thread;
    if (pthread_create(&thread, NULL, beat, (void *)microseconds) != 0)
        abort();
}

void heartbeat_new_window(void)
{
    pthread_mutex_lock(&beats.lock);
    memset(&beats.longest, 0, sizeof beats.longest);
    pthread_mutex_unlock(&beats.lock);
}

struct text {
    size_t length;
    char bytes[STATUS_LENGTH];
};

static void add(struct text *text, const char *format, ...) __attribute__((format(printf, 2, 3)));

static void add(struct text *text, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    size_t room = sizeof text->bytes - text->length;
    int length = vsnprintf(text->bytes + text->length, room, format, arguments);
    va_end(arguments);
    if (length < 0 || (size_t)length >= room)
        abort(); /* STATUS_LENGTH is too small */
    text->length += (size_t)length;
}

static void add_namespace(struct text *text, const char *field, const char *name)
{
    char path[64], link[64];
    snprintf(path, sizeof path, "/proc/self/ns/%s", name);
    ssize_t length = readlink(path, link, sizeof link - 1);
    link[length > 0 ? length : 0] = 0;
    add(text, "\"%s\":\"%s\",", field, link);
}

static void add_place(struct text *text)
{
    struct utsname host;
    uname(&host);
    add(text, "\"host\":\"%s\",", host.nodename);
    add_namespace(text, "net", "net");
    add_namespace(text, "mnt", "mnt");
    add_namespace(text, "time", "time");
    add_namespace(text, "pid_ns", "pid");
}

static void add_gaps(struct text *text)
{
    pthread_mutex_lock(&beats.lock);
    add(text, "\"longest_gap_ms\":%.3f,\"longest_gap_at\":%.6f,\"gaps_over_5ms\":%lu,\"gaps\":[", beats.longest.ms,
        beats.longest.at, beats.over_5ms);
    uint64_t first = beats.over_5ms > STATUS_GAPS ? beats.over_5ms - STATUS_GAPS : 0;
    for (uint64_t i = first; i < beats.over_5ms; i++)
        add(text, "%s[%.6f,%.3f]", i > first ? "," : "", beats.recent[i % STATUS_GAPS].at,
            beats.recent[i % STATUS_GAPS].ms);
    pthread_mutex_unlock(&beats.lock);
    add(text, "],");
}

static void compose(struct text *text)
{
    text->length = 0;
    status.sequence++;
    add(text, "{\"seq\":%lu,\"program\":\"%s\",\"pid\":%d,\"complaints\":%lu,\"first_complaint\":\"%s\",",
        status.sequence, status.program, getpid(), (uint64_t)status.complaints, status.first);
    add_place(text);
    add(text, "\"monotonic\":%.6f,\"realtime\":%.6f,", seconds_of(CLOCK_MONOTONIC), seconds_of(CLOCK_REALTIME));
    add_gaps(text);
    add(text, "\"counters\":{");
    for (int i = 0; i < status.counters; i++)
        add(text, "%s\"%s\":%lu", i ? "," : "", status.counter[i].name, (uint64_t)status.counter[i].value);
    add(text, "},\"end\":%lu}\n", status.sequence);
}

static struct text written;

void status_write(void)
{
    compose(&written);
    if (status.file < 0)
        return;
    /* The rest of the record is blank: a shorter status must not leave the end of a longer one behind it. */
    memset(written.bytes + written.length, ' ', sizeof written.bytes - written.length);
    written.bytes[sizeof written.bytes - 1] = '\n';
    if (pwrite(status.file, written.bytes, sizeof written.bytes, 0) != (ssize_t)sizeof written.bytes)
        complain("status", "writing the status file failed");
}

int status_finish(void)
{
    status_write();
    fwrite(written.bytes, 1, written.length, stdout);
    fflush(stdout);
    return complaints() == 0 ? 0 : 1;
}
