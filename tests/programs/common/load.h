/* What a workload may have besides its memory: threads that sleep, one that computes, an echo server, and a trace of
 * how it all went. Each `*_start` makes its threads and ends the program with a message if it cannot. */
#pragma once

#include <stddef.h>

#include "status.h"

/* Threads that wait, in different system calls, wake up now and then and check that they are who they were. */
void sleepers_start(int count);

/* One thread that computes as fast as it can, checking its results; counter "work". */
void spin_start(void);

/* Answers what comes in on "ADDRESS:PORT" with the same bytes; counter "echoed". */
void echo_start(const char *place);

/* A heartbeat every 100 us, like heartbeat_start(100), and a record of every 10 ms: the time (CLOCK_REALTIME, s), pages
 * written so far, work done so far, the longest gap that ended since the record before (ms), and the host. */
void trace_start(const counter_t *pages);
/* One line a record; the latest ones if there were too many. */
void trace_write(const char *path);
