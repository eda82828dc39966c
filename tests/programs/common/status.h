/* What every program here says about itself: complaints in its log, and one line of JSON in a status file.
 *
 * The status file is written in place by one pwrite of a fixed length; "seq" comes first and "end" last, so a
 * reader that finds them equal has read one whole status (and otherwise reads again). Fields:
 *   complaints, first_complaint   how often something was found wrong, and what it was the first time
 *   host, net, mnt, time, pid_ns  where the process runs now: uts node name, inodes of its namespaces
 *   monotonic, realtime           the clocks, seconds
 *   longest_gap_ms, longest_gap_at, gaps_over_5ms, gaps
 *                                 heartbeats by CLOCK_REALTIME: the longest time without one, when it ended,
 *                                 how many were longer than 5 ms, and the last few of those as [at, ms]
 *   counters                      by name: what was done so far
 */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum { STATUS_LENGTH = 8192, STATUS_COUNTERS = 96, STATUS_GAPS = 16 };

typedef _Atomic uint64_t counter_t;

/* `path` and `log` may be NULL: no status file; complaints go to standard error. */
void status_open(const char *program, const char *path, const char *log);
void status_write(void);
/* Print the status to standard output too. Returns the exit status: 0 only without a complaint. */
int status_finish(void);

/* A counter that appears in the status; to be made before the threads that count. */
counter_t *status_counter(const char *name);

void complain(const char *checker, const char *format, ...) __attribute__((format(printf, 2, 3)));
uint64_t complaints(void);

/* One heartbeat; only one thread may take them. */
void heartbeat(void);
/* Start that thread: a heartbeat every so many microseconds. */
void heartbeat_start(long microseconds);
/* Forget the longest gap so far: what comes next is a window of its own. */
void heartbeat_new_window(void);

double seconds_of(int clock);
