/* An arena: a range of addresses, what is mapped there, and the model of what every page must contain. */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "../common/pattern.h"
#include "../common/status.h"

enum { FILE_PAGES = 1024, LARGEST = 512 };

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
    int index, file;
    char *base;
    size_t pages, live;
    struct page *page;
    struct random random;
    uint64_t written; /* bytes, for the rate */
    counter_t *operations, *checked, *failed;
    pthread_t thread;
};

/* Start as a hole of `pages` pages, far from where the kernel places anything by itself. `file`: what
 * arena_make_file() gave. */
void arena_make(struct arena *arena, int index, size_t pages, uint64_t seed, int file);
/* A file of FILE_PAGES pages of known content; a descriptor of it. */
int arena_make_file(const char *directory);
/* Leave out the operations whose names are in the comma-separated list; false if there is no such name. */
bool arena_skip(const char *names);
/* Do something to it. */
void arena_step(struct arena *arena);
/* Compare every page with the model. */
void arena_check(struct arena *arena);
/* Say, as a complaint, what the model has at an address that should not have faulted; nothing if it is not its. */
void arena_explain(const struct arena *arena, const void *where);
/* Deliberate damage: some pages become zeros behind the model's back, as a lost page would. */
void arena_damage(struct arena *arena);
