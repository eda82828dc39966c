/* Vector, mask, x87 and general registers, their control words, and the GS base, across waits and system calls. */
#define _GNU_SOURCE
#include "check.h"

#include <asm/prctl.h>
#include <stddef.h>
#include <sys/syscall.h>

struct bank {
    uint8_t vector[32][64];
    uint64_t mask[8];
    uint64_t general[6]; /* rbx rbp r12 r13 r14 r15 */
    uint8_t x87[8][16];  /* 80-bit numbers */
    uint32_t mxcsr;
    uint16_t x87_control;
    int64_t result; /* of the system call */
};
/* hold.S knows these numbers. */
_Static_assert(offsetof(struct bank, mask) == 2048 && offsetof(struct bank, general) == 2112, "layout");
_Static_assert(offsetof(struct bank, x87) == 2160 && offsetof(struct bank, mxcsr) == 2288, "layout");
_Static_assert(offsetof(struct bank, x87_control) == 2292 && offsetof(struct bank, result) == 2296, "layout");

struct call {
    uint64_t number, argument[4];
};

typedef void hold_fn(const struct bank *in, struct bank *out, long spins, const struct call *call);
hold_fn hold_sse, hold_avx, hold_avx512;

struct level {
    const char *name;
    hold_fn *hold;
    int registers;
    size_t width;
    bool masks;
};
static struct level levels[3];
static int level_count;
static atomic_bool damaged;

static void find_levels(void)
{
    __builtin_cpu_init();
    levels[level_count++] = (struct level){"sse", hold_sse, 16, 16, false};
    if (__builtin_cpu_supports("avx2"))
        levels[level_count++] = (struct level){"avx", hold_avx, 16, 32, false};
    if (__builtin_cpu_supports("avx512bw"))
        levels[level_count++] = (struct level){"avx512", hold_avx512, 32, 64, true};
}

static void make_bank(struct bank *bank, struct random *random)
{
    uint64_t *words = (uint64_t *)bank;
    for (size_t i = 0; i < offsetof(struct bank, x87) / 8; i++)
        words[i] = random_next(random);
    memset(bank->x87, 0, sizeof bank->x87);
    for (int i = 0; i < 8; i++) {
        long double number = (long double)random_next(random) / 3;
        memcpy(bank->x87[i], &number, 10);
    }
    /* Rounding, flush-to-zero, denormals-are-zero and the sticky flags vary; every exception stays masked. */
    bank->mxcsr = 0x1f80 | (random_next(random) & 0xe07f);
    bank->x87_control = 0x037f | (random_next(random) & 0x0c00);
    bank->result = 0;
}

static void compare(const struct worker *self, const struct level *level, const struct bank *in, struct bank *out)
{
    for (int i = 0; i < level->registers; i++)
        if (memcmp(in->vector[i], out->vector[i], level->width) != 0)
            complain(self->name, "%s register %d changed", level->name, i);
    if (level->masks && memcmp(in->mask, out->mask, sizeof in->mask) != 0)
        complain(self->name, "mask registers changed");
    if (memcmp(in->general, out->general, sizeof in->general) != 0)
        complain(self->name, "general registers changed");
    for (int i = 0; i < 8; i++)
        if (memcmp(in->x87[i], out->x87[i], 10) != 0)
            complain(self->name, "x87 register %d changed", i);
    expect(self->name, "mxcsr", out->mxcsr, in->mxcsr);
    expect(self->name, "x87 control word", out->x87_control, in->x87_control);
    expect(self->name, "system call", out->result, in->result);
}

/* Most of the time the registers are held in a sleep, so that a stop finds them full without burning the CPU. */
static void one_round(struct worker *self, struct random *random)
{
    struct timespec length = {0, (long)random_below(random, 6000000)};
    struct call sleep = {SYS_nanosleep, {(uint64_t)&length}}, yield = {SYS_sched_yield, {0}};
    const struct call *choices[] = {&sleep, &sleep, &sleep, &yield, NULL};
    const struct call *call = choices[random_below(random, 5)];
    const struct level *level = &levels[random_below(random, (uint64_t)level_count)];
    struct bank in, out;
    make_bank(&in, random);
    memset(&out, 0, sizeof out);
    struct bank loaded = in;
    bool yes = true;
    if (atomic_compare_exchange_strong(&damaged, &yes, false))
        loaded.vector[3][5] ^= 1;
    level->hold(&loaded, &out, (long)random_below(random, call == &sleep ? 10 : 4000), call);
    compare(self, level, &in, &out);
}

static void body(struct worker *self)
{
    struct random random = {(uint64_t)self->index * 7919 + 1};
    uint64_t anchor = mix((uint64_t)self->index), seen;
    need(syscall(SYS_arch_prctl, ARCH_SET_GS, &anchor), "arch_prctl");
    while (lap(self)) {
        one_round(self, &random);
        __asm__ volatile("mov %%gs:0, %0" : "=r"(seen));
        expect(self->name, "word at the GS base", (long)seen, (long)anchor);
        pause_ms(self->name, 1);
    }
}

static void start(void)
{
    find_levels();
    for (int i = 0; i < options.threads; i++) {
        char name[24];
        snprintf(name, sizeof name, "registers-%d", i);
        spawn(name, body, NULL);
    }
}

static void damage_register(void)
{
    damaged = true;
}

static const struct breaker breakers[] = {{"register", damage_register}, {0}};
const struct checker registers_checker = {"registers", start, breakers};
