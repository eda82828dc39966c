/* Memory: pages of every kind that change all the time under a generation each, and pages that must never change. */
#define _GNU_SOURCE
#include "check.h"

#include <fcntl.h>
#include <limits.h>
#include <sys/mman.h>
#include <sys/uio.h>

static const char name[] = "heap";
enum { HUGE = 2 << 20 };

/* A page's content is determined by the region's number, the page's and its generation. */
struct region {
    const char *name;
    char *base;
    size_t pages;
    uint32_t *generation;
    int protection; /* what it has when nobody looks; the mutable ones can be written always */
};

static struct region mutable[] = {{.name = "malloc"},      {.name = "anonymous"}, {.name = "huge-page advice"},
                                  {.name = "locked"},      {.name = "private file"}, {.name = "brk"},
                                  {.name = "small blocks"}};
static struct region quiet[] = {{.name = "PROT_NONE", .protection = PROT_NONE},
                                {.name = "read-only", .protection = PROT_READ},
                                {.name = "executable", .protection = PROT_READ | PROT_EXEC}};
enum { MALLOC, ANONYMOUS, ADVISED, LOCKED, FILE_BACKED, BRK, SMALL, MUTABLE, QUIET = 3 };

static uint64_t seed_of(const struct region *region, size_t page)
{
    return mix((uint64_t)(uintptr_t)region->name ^ (page << 32) ^ region->generation[page]) | 1;
}

static void write_page(struct region *region, size_t page)
{
    region->generation[page]++;
    pattern_fill(region->base + page * PAGE, PAGE, seed_of(region, page));
}

static void check_page(const struct region *region, size_t page)
{
    long at = pattern_check(region->base + page * PAGE, PAGE, seed_of(region, page));
    if (at >= 0)
        complain(name, "%s: page %zu (%p) is wrong at byte %ld, generation %u", region->name, page,
                 (void *)(region->base + page * PAGE), at, region->generation[page]);
}

static void *map(size_t length, int flags, int fd)
{
    void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | flags, fd, 0);
    if (memory == MAP_FAILED)
        need(-1, "mmap");
    return memory;
}

static void set_region(struct region *region, void *base, size_t pages)
{
    region->base = base;
    region->pages = pages;
    region->generation = calloc(pages, sizeof *region->generation);
    for (size_t page = 0; page < pages; page++)
        write_page(region, page);
}

/* Only every other page is written: the rest must go on being the file's. */
static void map_file(struct region *region, size_t pages)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/mapped", options.directory);
    int fd = (int)need(open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600), path);
    char content[PAGE];
    region->pages = pages;
    region->generation = calloc(pages, sizeof *region->generation);
    for (size_t page = 0; page < pages; page++) {
        pattern_fill(content, PAGE, seed_of(region, page));
        need(write(fd, content, PAGE), "write");
    }
    region->base = map(pages * PAGE, 0, fd);
    close(fd);
    for (size_t page = 0; page < pages; page += 2)
        write_page(region, page);
}

static void set_up_mutable(size_t pages)
{
    set_region(&mutable[MALLOC], aligned_alloc(PAGE, pages * PAGE), pages);
    set_region(&mutable[ANONYMOUS], map(pages * PAGE, MAP_ANONYMOUS, -1), pages);
    char *room = map(3 * HUGE, MAP_ANONYMOUS, -1);
    room = (char *)(((uintptr_t)room + HUGE - 1) & ~(uintptr_t)(HUGE - 1));
    madvise(room, 2 * HUGE, MADV_HUGEPAGE);
    set_region(&mutable[ADVISED], room, 2 * HUGE / PAGE);
    set_region(&mutable[LOCKED], map(64 * PAGE, MAP_ANONYMOUS, -1), 64);
    need(mlock(mutable[LOCKED].base, 64 * PAGE), "mlock");
    map_file(&mutable[FILE_BACKED], 256);
    char *edge = sbrk(0);
    sbrk((PAGE - (intptr_t)((uintptr_t)edge % PAGE)) % PAGE);
    set_region(&mutable[BRK], sbrk(128 * PAGE), 128);
    set_region(&mutable[SMALL], calloc(4, PAGE), 4);
}

static void set_up_quiet(void)
{
    for (int i = 0; i < QUIET; i++) {
        size_t pages = 64 * (size_t)(i + 1);
        set_region(&quiet[i], map(pages * PAGE, MAP_ANONYMOUS, -1), pages);
        mprotect(quiet[i].base, pages * PAGE, quiet[i].protection);
    }
}

static void mutate(struct worker *self)
{
    struct random random = {12};
    while (lap(self)) {
        for (int i = 0; i < 64; i++) {
            struct region *region = &mutable[random_below(&random, MUTABLE)];
            size_t page = random_below(&random, region->pages);
            check_page(region, page);
            if (region != &mutable[FILE_BACKED] || page % 2 == 0)
                write_page(region, page);
        }
        pause_ms(self->name, 5);
    }
    for (struct region *region = mutable; region < mutable + MUTABLE; region++)
        for (size_t page = 0; page < region->pages; page++)
            check_page(region, page);
}

/* What a mapping permits, asked without a fault: the kernel answers EFAULT for what would be one. */
static void check_protection(const struct region *region)
{
    char byte = 0;
    struct iovec mine = {&byte, 1}, there = {region->base + PAGE, 1};
    bool readable = process_vm_readv(getpid(), &mine, 1, &there, 1, 0) == 1;
    bool writable = process_vm_writev(getpid(), &mine, 1, &there, 1, 0) == 1;
    expect(region->name, "may be read", readable, (region->protection & PROT_READ) != 0);
    expect(region->name, "may be written", writable, false);
}

static void look(struct worker *self)
{
    for (int round = 0; lap(self); round++) {
        struct region *region = &quiet[round % QUIET];
        check_protection(region);
        mprotect(region->base, region->pages * PAGE, PROT_READ);
        for (size_t page = 0; page < region->pages; page++)
            check_page(region, page);
        mprotect(region->base, region->pages * PAGE, region->protection);
        pause_ms(self->name, 100);
    }
}

/* Allocation goes on too: the allocator's own lists are state, and blocks come and go. */
static void allocate(struct worker *self)
{
    enum { BLOCKS = 256 };
    uint64_t *blocks[BLOCKS] = {0}, sizes[BLOCKS];
    struct random random = {13};
    while (lap(self)) {
        for (int i = 0; i < 50; i++) {
            uint64_t at = random_below(&random, BLOCKS);
            if (blocks[at] && pattern_check(blocks[at], sizes[at], at + 1) >= 0)
                complain(self->name, "a block of %lu bytes changed", sizes[at]);
            free(blocks[at]);
            sizes[at] = 8 * (1 + random_below(&random, i % 10 ? 500 : 40000));
            blocks[at] = malloc(sizes[at]);
            pattern_fill(blocks[at], sizes[at], at + 1);
        }
        pause_ms(self->name, 10);
    }
}

static void start(void)
{
    set_up_mutable((size_t)options.megabytes * 256 / 2 - 1024);
    set_up_quiet();
    spawn("heap-mutate", mutate, NULL);
    spawn("heap-quiet", look, NULL);
    spawn("heap-malloc", allocate, NULL);
}

static void damage_heap(void)
{
    struct region *region = &mutable[SMALL]; /* small: it is looked at within moments */
    for (size_t page = 0; page < region->pages; page++)
        region->base[page * PAGE + 1234] ^= 4;
}

static void damage_none(void)
{
    mprotect(quiet[0].base, PAGE, PROT_READ | PROT_WRITE);
    quiet[0].base[77] ^= 1;
    mprotect(quiet[0].base, PAGE, PROT_NONE);
}

/* Again and again: the checker itself changes the protection for a moment. */
static void damage_protection(void)
{
    for (int i = 0; i < 50; i++, usleep(10000))
        mprotect(quiet[1].base, quiet[1].pages * PAGE, PROT_READ | PROT_WRITE);
}

static const struct breaker breakers[] = {
    {"heap", damage_heap}, {"prot-none", damage_none}, {"protection", damage_protection}, {0}};
const struct checker heap_checker = {name, start, breakers};
