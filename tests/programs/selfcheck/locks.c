/* Mutexes and condition variables between threads, a robust mutex whose owner dies, threads that come and go. */
#define _GNU_SOURCE
#include "check.h"

/* ---- two threads take turns */
static pthread_mutex_t turn_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turn_changed = PTHREAD_COND_INITIALIZER;
static long turn;
static bool over;

static void take_turns(struct worker *self)
{
    const long mine = (long)self->argument;
    for (bool more = true; more;) {
        more = lap(self);
        pthread_mutex_lock(&turn_lock);
        while (turn % 2 != mine && !over)
            expect(self->name, "pthread_cond_wait", pthread_cond_wait(&turn_changed, &turn_lock), 0);
        over |= !more;
        turn++;
        pthread_cond_broadcast(&turn_changed);
        pthread_mutex_unlock(&turn_lock);
        pause_ms(self->name, 1);
    }
}

/* ---- many threads count under a lock that is held most of the time */
static pthread_mutex_t crowd_lock = PTHREAD_MUTEX_INITIALIZER;
static long crowd_count, crowd_copy;

static void crowd(struct worker *self)
{
    while (lap(self)) {
        pthread_mutex_lock(&crowd_lock);
        long next = crowd_count + 1;
        crowd_copy++;
        pause_ms(self->name, 2);
        expect(self->name, "count under the lock", crowd_copy, next);
        crowd_count = next;
        pthread_mutex_unlock(&crowd_lock);
        pause_ms(self->name, 1);
    }
}

/* ---- a thread dies with a robust mutex in its hands: the kernel tells the next one, by the list the thread gave it */
static pthread_mutex_t robust;
static atomic_bool unlock_first;

static void *die_holding(void *argument)
{
    (void)argument;
    expect("robust", "pthread_mutex_lock", pthread_mutex_lock(&robust), 0);
    pause_ms("robust", 400);
    if (unlock_first)
        pthread_mutex_unlock(&robust);
    return (void *)0x5eed;
}

static void inherit(struct worker *self)
{
    while (lap(self)) {
        pthread_t holder;
        void *answer = NULL;
        need(-pthread_create(&holder, NULL, die_holding, NULL), "pthread_create");
        pause_ms(self->name, 100); /* by now, or later, it holds the mutex */
        expect(self->name, "pthread_join", pthread_join(holder, &answer), 0);
        expect(self->name, "answer of a thread", (long)answer, 0x5eed);
        if (expect(self->name, "mutex whose owner died", pthread_mutex_lock(&robust), EOWNERDEAD))
            pthread_mutex_consistent(&robust);
        pthread_mutex_unlock(&robust);
    }
}

static void start(void)
{
    pthread_mutexattr_t kind;
    pthread_mutexattr_init(&kind);
    pthread_mutexattr_setrobust(&kind, PTHREAD_MUTEX_ROBUST);
    pthread_mutexattr_settype(&kind, PTHREAD_MUTEX_ERRORCHECK);
    pthread_mutex_init(&robust, &kind);
    spawn("turn-0", take_turns, (void *)0);
    spawn("turn-1", take_turns, (void *)1);
    spawn("crowd-0", crowd, NULL);
    spawn("crowd-1", crowd, NULL);
    spawn("robust", inherit, NULL);
}

static void damage_robust(void)
{
    unlock_first = true;
}

static void damage_lock(void)
{
    crowd_copy++;
}

static const struct breaker breakers[] = {{"robust", damage_robust}, {"lock", damage_lock}, {0}};
const struct checker locks_checker = {"locks", start, breakers};
