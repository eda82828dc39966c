/* Random changes of an address space, with a model of what every page must contain kept elsewhere in memory.
 *
 * Each thread owns an arena, a range of addresses that is its alone, and does to it in random order all that a program
 * may do: map (anonymous, file), unmap parts, move and resize mappings, drop pages, change protections, map anew where
 * something else was, ask for huge pages. The main thread moves the program break and grows its stack. After each
 * operation some random pages are compared with the model; on SIGUSR1 and at the end, all of them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "common/pattern.h"
#include "common/status.h"

enum { FILE_PAGES = 1024, LARGEST = 512, STACK_PAGES = 1024, BREAK_PAGES = 4096, THREADS_MAX = 8 };

enum kind { HOLE, ANONYMOUS, FILE_BACKED };

/* What a page is and contains. `seed` 0: zeros. */
struct page {
    uint64_t seed;
    uint32_t file_page;
    uint8_t kind, protection;
    bool free;    /* MADV_FREE: may be zeros by now */
    bool advised; /* MADV_HUGEPAGE */
};

struct arena {
    int index;
    char *base;
    size_t pages, live;
    struct page *page;
    struct random random;
    uint64_t written; /* bytes, for the rate */
    counter_t *operations, *checked, *failed;
    pthread_t thread;
};

static struct {
    uint64_t seed;
    double seconds, rate; /* rate: bytes per second, of all threads together */
    size_t megabytes;
    int threads;
    const char *status, *log, *directory;
    double break_after;
} options = {.seed = 1, .rate = 30e6, .megabytes = 64, .threads = 2, .directory = "."};

static struct arena arenas[THREADS_MAX];
static int file;
static atomic_bool stopping;
static atomic_int check_requests;

static uint64_t file_seed(size_t file_page)
{
    return mix(0xf11e0000 + file_page) | 1;
}

static char *address(const struct arena *arena, size_t at)
{
    return arena->base + at * PAGE;
}

/* ---- checking */
static bool matches(const struct arena *arena, size_t at)
{
    const struct page *page = &arena->page[at];
    return pattern_check(address(arena, at), PAGE, page->seed) < 0 ||
           (page->free && pattern_check(address(arena, at), PAGE, 0) < 0);
}

static void check_page(struct arena *arena, size_t at)
{
    struct page *page = &arena->page[at];
    if (page->kind == HOLE)
        return;
    bool hidden = !(page->protection & PROT_READ);
    if (hidden)
        mprotect(address(arena, at), PAGE, PROT_READ);
    if (!matches(arena, at))
        complain("churn", "arena %d page %zu (%p): wrong at byte %ld; kind %d protection %d seed %lx", arena->index, at,
                 (void *)address(arena, at), pattern_check(address(arena, at), PAGE, page->seed), page->kind,
                 page->protection, page->seed);
    if (hidden)
        mprotect(address(arena, at), PAGE, page->protection);
    atomic_fetch_add(arena->checked, 1);
}

static void check_all(struct arena *arena)
{
    for (size_t at = 0; at < arena->pages; at++)
        check_page(arena, at);
}

/* A hole must be one: the kernel answers ENOMEM for it. */
static void check_hole(struct arena *arena, size_t at)
{
    unsigned char resident;
    bool mapped = mincore(address(arena, at), PAGE, &resident) == 0;
    if (mapped != (arena->page[at].kind != HOLE))
        complain("churn", "arena %d page %zu is %s", arena->index, at, mapped ? "mapped" : "a hole");
}

/* ---- the model's ranges */
struct range {
    size_t at, length;
};

static struct range random_range(struct arena *arena)
{
    size_t length = 1 + random_below(&arena->random, random_below(&arena->random, 4) ? 32 : LARGEST);
    return (struct range){random_below(&arena->random, arena->pages - length), length};
}

static void set_page(struct arena *arena, size_t at, struct page page)
{
    arena->live += (page.kind != HOLE) - (size_t)(arena->page[at].kind != HOLE);
    arena->page[at] = page;
}

static void set_hole(struct arena *arena, struct range range)
{
    for (size_t i = 0; i < range.length; i++)
        set_page(arena, range.at + i, (struct page){0});
}

static bool all_mapped(const struct arena *arena, struct range range)
{
    for (size_t i = 0; i < range.length; i++)
        if (arena->page[range.at + i].kind == HOLE)
            return false;
    return true;
}

/* Pages from `at` on that the kernel can have in one mapping: same kind, protection and advice, file pages in order. */
static struct range run_at(const struct arena *arena, size_t at, size_t most)
{
    const struct page *first = &arena->page[at];
    size_t length = 0;
    for (; first->kind != HOLE && length < most && at + length < arena->pages; length++) {
        const struct page *page = first + length;
        if (page->kind != first->kind || page->protection != first->protection || page->advised != first->advised ||
            (first->kind == FILE_BACKED && page->file_page != first->file_page + length))
            break;
    }
    return (struct range){at, length};
}

static bool failed(struct arena *arena, bool condition)
{
    if (condition)
        atomic_fetch_add(arena->failed, 1);
    return condition;
}

/* ---- what is done to an arena: each operation changes the memory and its model alike */
static void write_pages(struct arena *arena, struct range range)
{
    for (size_t i = 0; i < range.length; i++) {
        struct page *page = &arena->page[range.at + i];
        if (page->kind == HOLE || !(page->protection & PROT_WRITE))
            continue;
        page->seed = random_next(&arena->random) | 1;
        page->free = false;
        pattern_fill(address(arena, range.at + i), PAGE, page->seed);
        arena->written += PAGE;
    }
}

static void map_range(struct arena *arena, struct range range)
{
    bool of_file = random_below(&arena->random, 4) == 0;
    uint32_t file_page = (uint32_t)random_below(&arena->random, FILE_PAGES - LARGEST);
    int protection = random_below(&arena->random, 8) ? PROT_READ | PROT_WRITE : PROT_READ;
    int flags = MAP_PRIVATE | MAP_FIXED | (of_file ? 0 : MAP_ANONYMOUS);
    void *got = mmap(address(arena, range.at), range.length * PAGE, protection, flags, of_file ? file : -1,
                     of_file ? (off_t)file_page * PAGE : 0);
    if (failed(arena, got == MAP_FAILED))
        return;
    for (size_t i = 0; i < range.length; i++) {
        struct page page = {.kind = of_file ? FILE_BACKED : ANONYMOUS, .protection = (uint8_t)protection};
        if (of_file) {
            page.file_page = file_page + (uint32_t)i;
            page.seed = file_seed(page.file_page);
        }
        set_page(arena, range.at + i, page);
    }
    if (random_below(&arena->random, 2))
        write_pages(arena, range);
}

static void unmap_range(struct arena *arena, struct range range)
{
    if (!failed(arena, munmap(address(arena, range.at), range.length * PAGE) < 0))
        set_hole(arena, range);
}

static void drop_range(struct arena *arena, struct range range)
{
    if (!all_mapped(arena, range) || failed(arena, madvise(address(arena, range.at), range.length * PAGE, MADV_DONTNEED) < 0))
        return;
    for (size_t i = 0; i < range.length; i++) {
        struct page *page = &arena->page[range.at + i];
        page->seed = page->kind == FILE_BACKED ? file_seed(page->file_page) : 0;
        page->free = false;
    }
}

static void free_range(struct arena *arena, struct range range)
{
    range = run_at(arena, range.at, range.length);
    if (range.length == 0 || arena->page[range.at].kind != ANONYMOUS ||
        failed(arena, madvise(address(arena, range.at), range.length * PAGE, MADV_FREE) < 0))
        return;
    for (size_t i = 0; i < range.length; i++)
        arena->page[range.at + i].free = true;
}

static void protect_range(struct arena *arena, struct range range)
{
    static const int choices[] = {PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE, PROT_READ | PROT_WRITE};
    int protection = choices[random_below(&arena->random, 4)];
    if (!all_mapped(arena, range) || failed(arena, mprotect(address(arena, range.at), range.length * PAGE, protection) < 0))
        return;
    for (size_t i = 0; i < range.length; i++)
        arena->page[range.at + i].protection = (uint8_t)protection;
}

static void advise_range(struct arena *arena, struct range range)
{
    bool advised = random_below(&arena->random, 4) != 0;
    if (!all_mapped(arena, range) || failed(arena, madvise(address(arena, range.at), range.length * PAGE,
                                                           advised ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) < 0))
        return;
    for (size_t i = 0; i < range.length; i++)
        arena->page[range.at + i].advised = advised;
}

static void shrink_range(struct arena *arena, struct range range)
{
    range = run_at(arena, range.at, range.length);
    if (range.length < 2)
        return;
    size_t keep = 1 + random_below(&arena->random, range.length - 1);
    char *at = address(arena, range.at);
    if (!failed(arena, mremap(at, range.length * PAGE, keep * PAGE, 0) != at))
        set_hole(arena, (struct range){range.at + keep, range.length - keep});
}

/* The model's side of a move. `wanted` is the new length: what is more than before is untouched. */
static void move_pages(struct arena *arena, struct range from, size_t to, size_t wanted)
{
    static __thread struct page moved[2 * LARGEST];
    memcpy(moved, &arena->page[from.at], from.length * sizeof moved[0]);
    for (size_t i = from.length; i < wanted; i++) {
        moved[i] = (struct page){.kind = moved[0].kind, .protection = moved[0].protection, .advised = moved[0].advised};
        if (moved[i].kind == FILE_BACKED) {
            moved[i].file_page = moved[0].file_page + (uint32_t)i;
            moved[i].seed = file_seed(moved[i].file_page);
        }
    }
    set_hole(arena, from);
    for (size_t i = 0; i < wanted; i++)
        set_page(arena, to + i, moved[i]);
}

/* Move, and grow by chance. A grown file mapping must not reach behind the file's end. */
static void move_range(struct arena *arena, struct range range)
{
    range = run_at(arena, range.at, range.length);
    if (range.length == 0)
        return;
    const struct page *first = &arena->page[range.at];
    size_t wanted = range.length;
    if (first->kind == ANONYMOUS || first->file_page + 2 * range.length < FILE_PAGES)
        wanted += random_below(&arena->random, 2) * random_below(&arena->random, range.length + 1);
    size_t to = random_below(&arena->random, arena->pages - wanted);
    if (to < range.at + range.length && range.at < to + wanted)
        return; /* overlap: EINVAL */
    char *target = address(arena, to);
    void *got = mremap(address(arena, range.at), range.length * PAGE, wanted * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
                       target);
    if (failed(arena, got != target)) {
        /* What the kernel keeps as two mappings cannot grow (EFAULT); the target may be gone nevertheless. */
        unmap_range(arena, (struct range){to, wanted});
        return;
    }
    move_pages(arena, range, to, wanted);
}

static void check_range(struct arena *arena, struct range range)
{
    for (size_t i = 0; i < range.length; i++) {
        check_hole(arena, range.at + i);
        check_page(arena, range.at + i);
    }
}

static const struct {
    void (*apply)(struct arena *, struct range);
    int weight;
} operations[] = {{write_pages, 30}, {map_range, 14},   {unmap_range, 5},  {drop_range, 6}, {free_range, 2},
                  {protect_range, 8}, {advise_range, 2}, {shrink_range, 3}, {move_range, 6}, {check_range, 24}};

static void apply_one(struct arena *arena)
{
    int choice = (int)random_below(&arena->random, 100);
    struct range range = random_range(arena);
    for (size_t i = 0; i < sizeof operations / sizeof operations[0]; i++) {
        choice -= operations[i].weight;
        if (choice < 0) {
            operations[i].apply(arena, range);
            atomic_fetch_add(arena->operations, 1);
            return;
        }
    }
    abort(); /* the weights add up to 100 */
}

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
        apply_one(arena);
        /* Half of the arena is mapped most of the time. */
        if (arena->live < arena->pages / 2)
            map_range(arena, random_range(arena));
        if (checked != check_requests) {
            checked = check_requests;
            check_all(arena);
        }
        while (!stopping && (double)arena->written * options.threads >
                                options.rate * (seconds_of(CLOCK_MONOTONIC) - begin + 0.01))
            sleep_ms(2);
    }
    check_all(arena);
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
    status_finish();
    _exit(1);
}

static void make_file(void)
{
    char path[4096], page[PAGE];
    snprintf(path, sizeof path, "%s/churn-file", options.directory);
    file = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    for (size_t at = 0; at < FILE_PAGES; at++) {
        pattern_fill(page, PAGE, file_seed(at));
        if (file < 0 || write(file, page, PAGE) != PAGE) {
            perror(path);
            exit(2);
        }
    }
}

/* The arenas start as holes, at addresses far from where the kernel places anything by itself. */
static void make_arena(int index)
{
    struct arena *arena = &arenas[index];
    char name[32];
    arena->index = index;
    arena->pages = 2 * options.megabytes * 256 / (size_t)options.threads;
    arena->base = (char *)(0x100000000000 + (uint64_t)index * 0x10000000000);
    arena->page = mmap(NULL, arena->pages * sizeof *arena->page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                       -1, 0);
    arena->random.state = options.seed * 1000 + (uint64_t)index;
    counter_t **counters[] = {&arena->operations, &arena->checked, &arena->failed};
    const char *names[] = {"operations", "checked", "failed"};
    for (int i = 0; i < 3; i++) {
        snprintf(name, sizeof name, "%s-%d", names[i], index);
        *counters[i] = status_counter(name);
    }
}

static void usage(void)
{
    fputs("usage: churn [--seed N] [--seconds S] [--megabytes M] [--rate MB/s] [--threads N] [--dir DIR]\n"
          "             [--status FILE] [--log FILE] [--break-after S]\n"
          "SIGUSR1 checks every page; SIGTERM checks and ends: 0 means no complaint.\n",
          stderr);
    exit(2);
}

static void parse(int count, char **arguments)
{
    static const struct option known[] = {{"seed", 1, 0, 's'},    {"seconds", 1, 0, 'e'}, {"megabytes", 1, 0, 'm'},
                                          {"rate", 1, 0, 'r'},    {"threads", 1, 0, 't'}, {"dir", 1, 0, 'd'},
                                          {"status", 1, 0, 'f'},  {"log", 1, 0, 'l'},     {"break-after", 1, 0, 'b'},
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
        default: usage();
        }
    if (optind != count || options.threads < 1 || options.threads > THREADS_MAX || options.megabytes < 8)
        usage();
}

/* Deliberate damage: the first pages that are there become zeros behind the model's back, as a lost page would. */
static void drop_pages(void)
{
    struct arena *arena = &arenas[0];
    for (size_t at = 0, dropped = 0; at < arena->pages && dropped < 64; at++)
        if (arena->page[at].kind == ANONYMOUS && arena->page[at].seed)
            dropped += madvise(address(arena, at), PAGE, MADV_DONTNEED) == 0;
    check_requests++;
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
            drop_pages();
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
    make_file();
    main_random.state = options.seed;
    stack_depth = status_counter("stack-depth");
    break_pages = status_counter("break-pages");
    for (int i = 0; i < options.threads; i++)
        make_arena(i);
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
