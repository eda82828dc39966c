/* Content that can be made again from a seed, so that a page can be checked to its last byte without a copy. */
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { PAGE = 4096 };

/* splitmix64: Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014. */
static inline uint64_t mix(uint64_t value)
{
    value += 0x9e3779b97f4a7c15u;
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
    return value ^ (value >> 31);
}

struct random {
    uint64_t state;
};

static inline uint64_t random_next(struct random *random)
{
    return mix(random->state += 0x9e3779b97f4a7c15u);
}

/* A number below `limit`, which is not 0. */
static inline uint64_t random_below(struct random *random, uint64_t limit)
{
    return random_next(random) % limit;
}

static inline uint64_t pattern_word(uint64_t seed, size_t index)
{
    return (seed * 0xd1342543de82ef95u + 1) * (2 * index + 1) ^ (seed >> 17);
}

/* `length` is a multiple of 8. Seed 0 is the pattern of an untouched page: zeros. */
static inline void pattern_fill(void *memory, size_t length, uint64_t seed)
{
    uint64_t *words = memory;
    for (size_t i = 0; i < length / 8; i++)
        words[i] = seed ? pattern_word(seed, i) : 0;
}

/* The offset of the first wrong byte, or -1. */
static inline long pattern_check(const void *memory, size_t length, uint64_t seed)
{
    const uint64_t *words = memory;
    for (size_t i = 0; i < length / 8; i++) {
        uint64_t wrong = words[i] ^ (seed ? pattern_word(seed, i) : 0);
        if (wrong)
            return (long)(i * 8) + __builtin_ctzll(wrong) / 8;
    }
    return -1;
}
