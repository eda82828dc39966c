/* What is done to an arena: each operation changes the memory and its model alike. */
#define _GNU_SOURCE
#include "arena.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

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

void arena_check(struct arena *arena)
{
    for (size_t at = 0; at < arena->pages; at++)
        check_page(arena, at);
}

/* The kernel answers ENOMEM for a hole. */
static bool mapped(const struct arena *arena, size_t at)
{
    unsigned char resident;
    return mincore(address(arena, at), PAGE, &resident) == 0;
}

/* A hole must be one, and nothing else may be. */
static void check_hole(struct arena *arena, size_t at)
{
    bool is = mapped(arena, at);
    if (is != (arena->page[at].kind != HOLE))
        complain("churn", "arena %d page %zu is %s", arena->index, at, is ? "mapped" : "a hole");
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

/* ---- the operations */
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

static void set_mapped(struct arena *arena, struct range range, struct page page)
{
    for (size_t i = 0; i < range.length; i++) {
        set_page(arena, range.at + i, page);
        if (page.kind == FILE_BACKED)
            page.seed = file_seed(++page.file_page);
    }
    if (random_below(&arena->random, 2))
        write_pages(arena, range);
}

static int random_protection(struct arena *arena)
{
    return random_below(&arena->random, 8) ? PROT_READ | PROT_WRITE : PROT_READ;
}

static void map_anonymous(struct arena *arena, struct range range)
{
    int protection = random_protection(arena);
    void *got = mmap(address(arena, range.at), range.length * PAGE, protection,
                     MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS, -1, 0);
    if (!failed(arena, got == MAP_FAILED))
        set_mapped(arena, range, (struct page){.kind = ANONYMOUS, .protection = (uint8_t)protection});
}

static void map_file(struct arena *arena, struct range range)
{
    int protection = random_protection(arena);
    uint32_t first = (uint32_t)random_below(&arena->random, FILE_PAGES - LARGEST);
    void *got = mmap(address(arena, range.at), range.length * PAGE, protection, MAP_PRIVATE | MAP_FIXED, arena->file,
                     (off_t)first * PAGE);
    struct page page = {.seed = file_seed(first), .file_page = first, .kind = FILE_BACKED};
    page.protection = (uint8_t)protection;
    if (!failed(arena, got == MAP_FAILED))
        set_mapped(arena, range, page);
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

/* What the kernel keeps as several mappings cannot grow, and may move in part before it fails (EFAULT, mremap(2)). The
 * target's old content may be gone or not: it goes now. */
static void settle_failed_move(struct arena *arena, struct range from, size_t to, size_t wanted)
{
    for (size_t i = 0; i < wanted; i++) {
        if (i < from.length && !mapped(arena, from.at + i)) {
            set_page(arena, to + i, arena->page[from.at + i]);
            set_hole(arena, (struct range){from.at + i, 1});
        } else {
            unmap_range(arena, (struct range){to + i, 1});
        }
    }
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
    if (failed(arena, got != target))
        settle_failed_move(arena, range, to, wanted);
    else
        move_pages(arena, range, to, wanted);
}

static void check_range(struct arena *arena, struct range range)
{
    for (size_t i = 0; i < range.length; i++) {
        check_hole(arena, range.at + i);
        check_page(arena, range.at + i);
    }
}

static struct operation {
    const char *name;
    void (*apply)(struct arena *, struct range);
    int weight;
} operations[] = {{"write", write_pages, 30}, {"map", map_anonymous, 10},    {"file", map_file, 4},
                  {"unmap", unmap_range, 5},  {"drop", drop_range, 6},        {"free", free_range, 2},
                  {"protect", protect_range, 8}, {"advise", advise_range, 2}, {"shrink", shrink_range, 3},
                  {"move", move_range, 6},    {"check", check_range, 24}};
enum { OPERATIONS = sizeof operations / sizeof operations[0] };

static int total_weight(void)
{
    int total = 0;
    for (int i = 0; i < OPERATIONS; i++)
        total += operations[i].weight;
    return total;
}

static const struct operation *choose(struct arena *arena)
{
    int choice = (int)random_below(&arena->random, (uint64_t)total_weight());
    const struct operation *operation = operations;
    while ((choice -= operation->weight) >= 0)
        operation++;
    return operation;
}

static bool skip(const char *name, size_t length)
{
    for (int i = 0; i < OPERATIONS; i++)
        if (strlen(operations[i].name) == length && memcmp(operations[i].name, name, length) == 0) {
            operations[i].weight = 0;
            return true;
        }
    return false;
}

bool arena_skip(const char *names)
{
    for (size_t length; *names; names += length + (names[length] == ','))
        if (!skip(names, length = strcspn(names, ",")))
            return false;
    return total_weight() > 0;
}

void arena_step(struct arena *arena)
{
    choose(arena)->apply(arena, random_range(arena));
    atomic_fetch_add(arena->operations, 1);
    /* Half of the arena is mapped most of the time. */
    if (arena->live < arena->pages / 2)
        map_anonymous(arena, random_range(arena));
}

void arena_explain(const struct arena *arena, const void *where)
{
    size_t at = (size_t)((const char *)where - arena->base) / PAGE;
    if ((const char *)where < arena->base || at >= arena->pages)
        return;
    const struct page *page = &arena->page[at];
    complain("churn", "arena %d page %zu has kind %d, protection %d in the model, and is %s", arena->index, at,
             page->kind, page->protection, mapped(arena, at) ? "mapped" : "a hole");
}

void arena_damage(struct arena *arena)
{
    for (size_t at = 0, dropped = 0; at < arena->pages && dropped < 64; at++)
        if (arena->page[at].kind == ANONYMOUS && arena->page[at].seed)
            dropped += madvise(address(arena, at), PAGE, MADV_DONTNEED) == 0;
}

int arena_make_file(const char *directory)
{
    char path[4096], page[PAGE];
    snprintf(path, sizeof path, "%s/churn-file", directory);
    int file = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    for (size_t at = 0; at < FILE_PAGES; at++) {
        pattern_fill(page, PAGE, file_seed(at));
        if (file < 0 || write(file, page, PAGE) != PAGE) {
            perror(path);
            exit(2);
        }
    }
    return file;
}

static counter_t *named_counter(const char *name, int index)
{
    char full[32];
    snprintf(full, sizeof full, "%s-%d", name, index);
    return status_counter(full);
}

void arena_make(struct arena *arena, int index, size_t pages, uint64_t seed, int file)
{
    arena->index = index;
    arena->file = file;
    arena->pages = pages;
    arena->base = (char *)(0x100000000000 + (uint64_t)index * 0x10000000000);
    arena->page = mmap(NULL, pages * sizeof *arena->page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    arena->random.state = seed * 1000 + (uint64_t)index;
    arena->operations = named_counter("operations", index);
    arena->checked = named_counter("checked", index);
    arena->failed = named_counter("failed", index);
}
