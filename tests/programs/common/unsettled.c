#define _GNU_SOURCE
#include "unsettled.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "pattern.h"
#include "status.h"

#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102 /* Linux 6.13 */
#endif

/* Where what lies in the room, in pages; a page without access is between them. */
enum { KEPT = 0, KEPT_PAGES = 16, GROWN = 17, GROWN_MAX = 8, GUARDED = 27, FILES = 29, FILES_MAX = 16 };
enum { ROOM = FILES + FILES_MAX, TURNS_OF_A_FILE = 8, HEAD = 256 };

static char *room;
static bool kept[KEPT_PAGES], guarded; /* what is in the pages that are kept mapped */
static const char *const *names;
static size_t name_count;
static int opened = -1;
static char opened_head[HEAD];
static counter_t *turns;

static void *page(size_t number)
{
    return room + number * PAGE;
}

static void die(const char *what)
{
    perror(what);
    exit(2);
}

static void map(size_t at, size_t pages, int protection, int flags, int fd)
{
    int how = MAP_PRIVATE | MAP_FIXED | flags;
    if (mmap(page(at), pages * PAGE, protection, how, fd, 0) == MAP_FAILED)
        complain("unsettled", "mmap: %s", strerror(errno));
}

static void expect(size_t at, uint64_t seed)
{
    long wrong = pattern_check(page(at), PAGE, seed);
    if (wrong >= 0)
        complain("unsettled", "page %zu (%p) is wrong at byte %ld", at, page(at), wrong);
}

/* One page more is written, or one less is there. */
static void drop_or_write(struct random *random)
{
    size_t at = random_below(random, KEPT_PAGES);
    expect(KEPT + at, kept[at] ? at + 1 : 0);
    if (!kept[at])
        pattern_fill(page(KEPT + at), PAGE, at + 1);
    else if (madvise(page(KEPT + at), PAGE, MADV_DONTNEED) < 0)
        complain("unsettled", "madvise: %s", strerror(errno));
    kept[at] = !kept[at];
}

/* A mapping of another length, with content of its own. */
static void grow_anew(struct random *random)
{
    static size_t length;
    static uint64_t seed;
    for (size_t i = 0; i < length; i++)
        expect(GROWN + i, seed);
    map(GROWN, GROWN_MAX, PROT_NONE, MAP_ANONYMOUS | MAP_NORESERVE, -1);
    length = 1 + random_below(random, GROWN_MAX);
    seed = random_next(random) | 1;
    map(GROWN, length, PROT_READ | PROT_WRITE, MAP_ANONYMOUS, -1);
    for (size_t i = 0; i < length; i++)
        pattern_fill(page(GROWN + i), PAGE, seed);
}

/* One file less is mapped, and one more, each at a place of its own. */
static void map_another_file(size_t number)
{
    static size_t before;
    const char *name = names[number];
    char head[HEAD];
    map(FILES + before, 1, PROT_NONE, MAP_ANONYMOUS | MAP_NORESERVE, -1);
    before = number;
    int fd = open(name, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || pread(fd, head, sizeof head, 0) != sizeof head) {
        complain("unsettled", "%s: %s", name, strerror(errno));
        return;
    }
    map(FILES + number, 1, PROT_READ, 0, fd);
    close(fd);
    if (memcmp(page(FILES + number), head, sizeof head) != 0)
        complain("unsettled", "what is mapped is not %s", name);
}

/* A guard page is there for those only who touch it. */
static void expect_guard(void)
{
    char byte;
    struct iovec here = {&byte, 1}, there = {page(GUARDED), 1};
    if (guarded && process_vm_readv(getpid(), &here, 1, &there, 1, 0) >= 0)
        complain("unsettled", "the guard page can be read");
}

static void expect_open(void)
{
    char head[HEAD];
    if (opened >= 0 && (pread(opened, head, sizeof head, 0) != sizeof head || memcmp(head, opened_head, sizeof head)))
        complain("unsettled", "the open file is another one");
}

static void *change(void *argument)
{
    struct random random = {7};
    (void)argument;
    for (uint64_t turn = 0;; turn++) {
        drop_or_write(&random);
        grow_anew(&random);
        if (name_count && turn % TURNS_OF_A_FILE == 0)
            map_another_file(turn / TURNS_OF_A_FILE % name_count);
        expect_guard();
        expect_open();
        atomic_fetch_add(turns, 1);
        nanosleep(&(struct timespec){0, 500000}, NULL);
    }
    return NULL;
}

void unsettled_start(const char *const *files, size_t count, const char *open_file)
{
    pthread_t thread;
    turns = status_counter("turns");
    names = files;
    name_count = count < FILES_MAX ? count : FILES_MAX;
    room = mmap(NULL, ROOM * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED)
        die("mmap");
    map(KEPT, KEPT_PAGES, PROT_READ | PROT_WRITE, MAP_ANONYMOUS, -1);
    map(GUARDED, 1, PROT_READ | PROT_WRITE, MAP_ANONYMOUS, -1);
    guarded = madvise(page(GUARDED), PAGE, MADV_GUARD_INSTALL) == 0;
    if (open_file) {
        opened = open(open_file, O_RDONLY | O_CLOEXEC);
        if (opened < 0 || pread(opened, opened_head, HEAD, 0) != HEAD)
            die(open_file);
    }
    if (pthread_create(&thread, NULL, change, NULL) != 0)
        die("pthread_create");
}
