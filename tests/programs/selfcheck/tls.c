/* Thread-local storage of every kind: static, a library's, pthread keys, errno; and the thread's own stack. */
#define _GNU_SOURCE
#include "check.h"

#include <sys/syscall.h>

uint64_t *tls_library_slots(void);

static __thread uint64_t words[4] = {1, 2, 3, 4};
static pthread_key_t key;
static uint64_t *_Atomic victim; /* one thread's word, for the damage */

enum { THREADS = 3 };

static void check(struct worker *self, uint64_t round, int error)
{
    uint64_t *slots = tls_library_slots();
    for (int i = 0; i < 4; i++) {
        uint64_t wanted = mix((uint64_t)self->index * 1000 + round * 4 + (uint64_t)i);
        expect(self->name, "thread-local variable", (long)words[i], (long)wanted);
        expect(self->name, "library's thread-local variable", (long)slots[i], (long)~wanted);
    }
    expect(self->name, "pthread key", (long)pthread_getspecific(key), (long)round);
    expect(self->name, "errno", error, (int)(round % 4000));
    expect(self->name, "pthread_self", (long)pthread_self(), (long)self->thread);
}

static void body(struct worker *self)
{
    victim = &words[2];
    for (uint64_t round = 1; lap(self); round++) {
        for (int i = 0; i < 4; i++) {
            words[i] = mix((uint64_t)self->index * 1000 + round * 4 + (uint64_t)i);
            tls_library_slots()[i] = ~words[i];
        }
        pthread_setspecific(key, (void *)round);
        errno = (int)(round % 4000);
        /* A sleep that succeeds leaves errno alone. */
        struct timespec length = {0, 20000000};
        nanosleep(&length, NULL);
        check(self, round, errno);
    }
}

static void start(void)
{
    need(-pthread_key_create(&key, NULL), "pthread_key_create");
    for (int i = 0; i < THREADS; i++) {
        char name[24];
        snprintf(name, sizeof name, "tls-%d", i);
        spawn(name, body, NULL);
    }
}

static void damage_tls(void)
{
    *victim ^= 1;
}

static const struct breaker breakers[] = {{"tls", damage_tls}, {0}};
const struct checker tls_checker = {"tls", start, breakers};
