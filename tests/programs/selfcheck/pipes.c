/* Pipes, a FIFO and eventfds: what was written is what is read, in order, however long it lies there. */
#define _GNU_SOURCE
#include "check.h"

#include <fcntl.h>
#include <limits.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>

enum { LARGEST = 96 * 1024, FULL_SIZE = 256 * 1024 };

/* ---- ping-pong: a message is a header and a body that its header's numbers determine */
struct header {
    uint64_t sequence, length;
};
static int ping[2], pong[2];
static atomic_bool corrupt;

static bool move_all(const char *checker, int fd, void *memory, size_t length, bool out)
{
    for (size_t done = 0; done < length;) {
        char *at = (char *)memory + done;
        ssize_t part = out ? write(fd, at, length - done) : read(fd, at, length - done);
        if (part <= 0) {
            complain(checker, "%s fd %d: %zd, %s", out ? "write" : "read", fd, part, strerror(errno));
            return false;
        }
        done += (size_t)part;
    }
    return true;
}

static bool send_message(const char *checker, int fd, uint64_t sequence, uint64_t length, char *room)
{
    struct header header = {sequence, length};
    pattern_fill(room, length, sequence + length);
    bool yes = true;
    if (length && atomic_compare_exchange_strong(&corrupt, &yes, false))
        room[length / 2] ^= 1;
    return move_all(checker, fd, &header, sizeof header, true) && move_all(checker, fd, room, length, true);
}

static bool receive_message(const char *checker, int fd, uint64_t sequence, struct header *header, char *room)
{
    if (!move_all(checker, fd, header, sizeof *header, false))
        return false;
    expect(checker, "sequence", (long)header->sequence, (long)sequence);
    if (header->length > LARGEST) {
        complain(checker, "length %lu", header->length);
        return false;
    }
    bool whole = move_all(checker, fd, room, header->length, false);
    if (pattern_check(room, header->length, header->sequence + header->length) >= 0)
        complain(checker, "content of message %lu", header->sequence);
    return whole;
}

static void play(struct worker *self)
{
    char *room = aligned_alloc(PAGE, LARGEST);
    struct random random = {99};
    struct header back;
    for (uint64_t sequence = 1;; sequence++) {
        uint64_t length = sequence % 3 ? random_below(&random, 64) * 8 : random_below(&random, LARGEST / 8) * 8;
        bool more = lap(self);
        if (!more) { /* sequence 0 tells the other side to end */
            send_message(self->name, ping[1], 0, 0, room);
            return;
        }
        if (!send_message(self->name, ping[1], sequence, length, room))
            return;
        if (!receive_message(self->name, pong[0], sequence, &back, room))
            return;
        expect(self->name, "length of the answer", (long)back.length, (long)length);
        pause_ms(self->name, 2);
    }
}

static void answer(struct worker *self)
{
    char *room = aligned_alloc(PAGE, LARGEST);
    struct header header;
    for (uint64_t sequence = 1;; sequence++) {
        lap(self);
        if (!move_all(self->name, ping[0], &header, sizeof header, false) || header.sequence == 0)
            return;
        expect(self->name, "sequence", (long)header.sequence, (long)sequence);
        if (header.length > LARGEST || !move_all(self->name, ping[0], room, header.length, false))
            return;
        if (pattern_check(room, header.length, header.sequence + header.length) >= 0)
            complain(self->name, "content of message %lu", header.sequence);
        if (!send_message(self->name, pong[1], sequence, header.length, room))
            return;
    }
}

/* ---- a stream of numbered words that is kept full: what lies in the pipe is known at any time */
struct reservoir {
    const char *name;
    int in, out, size;
    uint64_t written, read; /* words */
};
static struct reservoir full_pipe = {.name = "full-pipe", .size = FULL_SIZE}, fifo = {.name = "fifo"};

static void fill(struct reservoir *pipe)
{
    uint64_t words[512];
    for (;;) {
        for (int i = 0; i < 512; i++)
            words[i] = mix(pipe->written + (uint64_t)i);
        ssize_t length = write(pipe->in, words, sizeof words);
        if (length < 0) {
            expect(pipe->name, "write to a full pipe", errno, EAGAIN);
            return;
        }
        expect(pipe->name, "write", length % 8, 0);
        pipe->written += (uint64_t)length / 8;
    }
}

static void drain(struct reservoir *pipe, uint64_t words)
{
    while (words > 0) {
        uint64_t got[512], wanted = words < 512 ? words : 512;
        ssize_t length = read(pipe->out, got, wanted * 8);
        if (!expect(pipe->name, "read", length > 0 && length % 8 == 0, true))
            return;
        for (ssize_t i = 0; i < length / 8; i++, pipe->read++)
            if (!expect(pipe->name, "word", (long)got[i], (long)mix(pipe->read)))
                return;
        words -= (uint64_t)length / 8;
    }
}

static void check_reservoir(const struct reservoir *pipe)
{
    int held = -1;
    ioctl(pipe->out, FIONREAD, &held);
    expect(pipe->name, "bytes held", held, (long)(pipe->written - pipe->read) * 8);
    expect(pipe->name, "pipe size", fcntl(pipe->in, F_GETPIPE_SZ), pipe->size);
    expect(pipe->name, "flags of the writing end", fcntl(pipe->in, F_GETFL) & (O_ACCMODE | O_NONBLOCK),
           O_WRONLY | O_NONBLOCK);
    expect(pipe->name, "flags of the reading end", fcntl(pipe->out, F_GETFL) & O_ACCMODE, O_RDONLY);
}

static void keep_full(struct worker *self)
{
    struct reservoir *pipe = self->argument;
    struct random random = {5};
    while (lap(self)) {
        fill(pipe);
        for (int i = 0; i < 20; i++, pause_ms(self->name, 50))
            check_reservoir(pipe);
        drain(pipe, random_below(&random, pipe->written - pipe->read + 1));
    }
    drain(pipe, pipe->written - pipe->read);
}

/* ---- eventfds: a counter that waits to be read, a semaphore, and a signalfd */
static int counter, semaphore, signals;

static void check_events(struct worker *self)
{
    struct random random = {6};
    for (uint64_t round = 0; lap(self); round++) {
        uint64_t value = 1 + random_below(&random, 1u << 20), got = 0, one = 1, three = 3;
        for (int i = 0; i < 5; i++)
            sigqueue(getpid(), SIG_FD, (union sigval){.sival_int = (int)(round * 5) + i});
        move_all(self->name, counter, &value, 8, true);
        move_all(self->name, semaphore, &three, 8, true);
        pause_ms(self->name, 200);
        move_all(self->name, counter, &got, 8, false);
        expect(self->name, "eventfd counter", (long)got, (long)value);
        expect(self->name, "empty eventfd", read(counter, &got, 8), -1);
        for (int i = 0; i < 3; i++)
            if (move_all(self->name, semaphore, &got, 8, false))
                expect(self->name, "eventfd semaphore", (long)got, (long)one);
        expect(self->name, "empty semaphore", read(semaphore, &got, 8), -1);
        for (int i = 0; i < 5; i++) {
            struct signalfd_siginfo info = {0};
            move_all(self->name, signals, &info, sizeof info, false);
            expect(self->name, "value from the signalfd", (long)info.ssi_int, (long)(round * 5) + i);
        }
    }
}

static void open_fifo(void)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/fifo", options.directory);
    const char *name = options.fifo ? options.fifo : path;
    if (mkfifo(name, 0600) < 0 && errno != EEXIST)
        need(-1, name);
    fifo.out = (int)need(open(name, O_RDONLY | O_NONBLOCK | O_CLOEXEC), name);
    fifo.in = (int)need(open(name, O_WRONLY | O_NONBLOCK | O_CLOEXEC), name);
    fifo.size = fcntl(fifo.in, F_GETPIPE_SZ);
}

static void start(void)
{
    int ends[2];
    need(pipe(ping) | pipe(pong) | pipe2(ends, O_NONBLOCK), "pipe");
    full_pipe.out = ends[0];
    full_pipe.in = ends[1];
    need(fcntl(ends[1], F_SETPIPE_SZ, FULL_SIZE), "F_SETPIPE_SZ");
    open_fifo();
    counter = (int)need(eventfd(0, EFD_NONBLOCK), "eventfd");
    semaphore = (int)need(eventfd(0, EFD_NONBLOCK | EFD_SEMAPHORE), "eventfd");
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIG_FD);
    signals = (int)need(signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC), "signalfd");
    spawn("pipe-ping", play, NULL);
    spawn("pipe-pong", answer, NULL);
    spawn(full_pipe.name, keep_full, &full_pipe);
    spawn(fifo.name, keep_full, &fifo);
    spawn("eventfd", check_events, NULL);
}

static void damage_pipe(void)
{
    corrupt = true;
}

static void damage_pipe_byte(void)
{
    uint64_t word;
    if (read(full_pipe.out, &word, 8) != 8)
        abort();
}

static void damage_fifo(void)
{
    uint64_t word;
    if (read(fifo.out, &word, 8) != 8)
        abort();
}

static void damage_eventfd(void)
{
    /* Again and again, so that one comes between a write and its read. */
    for (int i = 0; i < 100; i++) {
        uint64_t value;
        if (read(counter, &value, 8) == 8)
            return;
        usleep(10000);
    }
}

static const struct breaker breakers[] = {{"pipe", damage_pipe},
                                          {"full-pipe", damage_pipe_byte},
                                          {"fifo", damage_fifo},
                                          {"eventfd", damage_eventfd},
                                          {0}};
const struct checker pipes_checker = {"pipes", start, breakers};
