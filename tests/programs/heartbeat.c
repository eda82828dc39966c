/* A process with much memory that it keeps writing, and a heartbeat by CLOCK_REALTIME: its longest gap is the pause
 * as the process felt it.
 *
 * Every page holds a generation and content that follows from it; the writers check a page before they write it again,
 * so a page that was lost or is old is a complaint. */
#define _GNU_SOURCE
#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "common/load.h"
#include "common/pattern.h"
#include "common/status.h"
#include "common/unsettled.h"

enum { THREADS_MAX = 64, FILES_MAX = 16, WORDS = PAGE / 8, CHUNK = 64 };
enum fill { RANDOM, TEXT, ZERO, SPARSE };

static struct {
    size_t megabytes, mappings, working_set; /* working_set: how much of the memory is written, 0: all */
    double rate, seconds;                    /* rate: bytes per second, of all writers together */
    int threads, sleepers;
    enum fill fill;
    bool sweep, spin, unsettled;
    const char *status, *log, *trace, *listen, *open;
    const char *files[FILES_MAX]; /* that the unsettled thread maps */
    size_t file_count;
} options = {.megabytes = 64, .mappings = 1, .rate = 10e6, .threads = 1};

struct writer {
    size_t first, pages; /* its share */
    struct random random;
    size_t next;
    pthread_t thread;
};

static char **mapping; /* of `pages_each` pages */
static size_t pages_each, pages_total;
static uint32_t *generation;
static atomic_bool stopping;
static counter_t *written;

static uint64_t *page_at(size_t page)
{
    return (uint64_t *)(mapping[page / pages_each] + page % pages_each * PAGE);
}

static const char words_of_text[8][9] = {"the     ", "process ", "moves   ", "between ",
                                         "hosts   ", "and its ", "users do", "not see."};

static void random_content(uint64_t *words, uint64_t seed)
{
    uint64_t product = pattern_word(seed, 0) ^ seed >> 17, step = 2 * product;
    for (size_t i = 0; i < WORDS; i++, product += step) /* pattern_word(seed, i), without its multiplications */
        words[i] = product ^ seed >> 17;
}

static void text_content(uint64_t *words, uint64_t seed)
{
    for (size_t i = 0; i < WORDS; i++, seed >>= 3) {
        if (i % 21 == 0)
            seed = mix(seed + i);
        memcpy(&words[i], words_of_text[seed & 7], 8);
    }
}

static void content_of(uint64_t *words, size_t page)
{
    uint64_t seed = mix((uint64_t)page << 32 | generation[page]);
    if (options.fill == TEXT) {
        text_content(words, seed);
    } else if (options.fill == RANDOM || (options.fill == SPARSE && page % 4 == 0)) {
        random_content(words, seed | 1);
    } else { /* all zeros but for the generation, and that only once it is written */
        memset(words, 0, PAGE);
        words[0] = generation[page];
    }
}

static void fill_page(size_t page)
{
    content_of(page_at(page), page);
}

static void check_page(size_t page)
{
    const uint64_t *words = page_at(page);
    uint64_t expected[WORDS];
    size_t i = 0;
    content_of(expected, page);
    if (memcmp(words, expected, PAGE) == 0)
        return;
    while (i < WORDS && words[i] == expected[i])
        i++;
    complain("heartbeat", "page %zu (%p) is wrong at word %zu, generation %u", page, (const void *)words, i,
             generation[page]);
}

static size_t choose(struct writer *writer)
{
    if (options.sweep)
        return writer->first + writer->next++ % writer->pages;
    return writer->first + random_below(&writer->random, writer->pages);
}

static void *write_pages(void *argument)
{
    struct writer *writer = argument;
    double begin = seconds_of(CLOCK_MONOTONIC), done = 0;
    while (!stopping) {
        double due = options.rate / options.threads * (seconds_of(CLOCK_MONOTONIC) - begin);
        for (int i = 0; i < CHUNK && done < due; i++, done += PAGE) {
            size_t page = choose(writer);
            check_page(page);
            generation[page]++;
            fill_page(page);
            atomic_fetch_add(written, 1);
        }
        /* What could not be written in a pause is not made up for. */
        if (due - done > options.rate)
            done = due;
        if (done >= due)
            nanosleep(&(struct timespec){0, 1000000}, NULL);
    }
    return NULL;
}

static void *map_pages(size_t length, int protection)
{
    void *memory = mmap(NULL, length, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        perror("mmap");
        exit(2);
    }
    return memory;
}

/* A page without access between two mappings keeps the kernel from making one of them. */
static void map_all(void)
{
    pages_each = options.megabytes * 256 / options.mappings;
    pages_total = pages_each * options.mappings;
    mapping = malloc(options.mappings * sizeof *mapping);
    generation = map_pages((pages_total * sizeof *generation + PAGE - 1) / PAGE * PAGE, PROT_READ | PROT_WRITE);
    size_t stride = (pages_each + 1) * PAGE;
    char *room = map_pages(options.mappings * stride, PROT_NONE);
    for (size_t i = 0; i < options.mappings; i++) {
        mapping[i] = room + i * stride;
        if (mprotect(mapping[i], pages_each * PAGE, PROT_READ | PROT_WRITE) < 0) {
            perror("mprotect");
            exit(2);
        }
    }
    if (options.fill != ZERO)
        for (size_t page = 0; page < pages_total; page++)
            fill_page(page);
}

static void usage(void)
{
    fputs("usage: heartbeat [--megabytes M] [--mappings N] [--fill random|text|zero|sparse]\n"
          "                 [--rate MB/s] [--sweep] [--working-set M] [--threads N] [--sleepers N] [--spin]\n"
          "                 [--listen ADDRESS:PORT] [--unsettled [--map FILE]... [--open FILE]]\n"
          "                 [--seconds S] [--status FILE] [--log FILE] [--trace FILE]\n"
          "zero memory is not there until it is written; sparse is there, and three of four pages are zeros.\n"
          "SIGUSR1 prints the status and starts a new window for the longest gap; SIGTERM checks all and ends.\n",
          stderr);
    exit(2);
}

static enum fill fill_of(const char *name)
{
    static const char *const names[] = {"random", "text", "zero", "sparse"};
    for (int i = 0; i < 4; i++)
        if (strcmp(name, names[i]) == 0)
            return (enum fill)i;
    usage();
    return RANDOM;
}

static void parse(int count, char **arguments)
{
    static const struct option known[] = {
        {"megabytes", 1, 0, 'm'}, {"mappings", 1, 0, 'n'}, {"rate", 1, 0, 'r'},   {"sweep", 0, 0, 'w'},
        {"fill", 1, 0, 'f'},      {"threads", 1, 0, 't'},  {"status", 1, 0, 's'}, {"log", 1, 0, 'l'},
        {"seconds", 1, 0, 'e'},   {"working-set", 1, 0, 'k'}, {"sleepers", 1, 0, 'p'}, {"spin", 0, 0, 'c'},
        {"trace", 1, 0, 'a'},     {"listen", 1, 0, 'i'},   {"unsettled", 0, 0, 'u'},
        {"map", 1, 0, 'b'},       {"open", 1, 0, 'o'},     {0},
    };
    for (int option; (option = getopt_long(count, arguments, "", known, NULL)) != -1;)
        switch (option) {
        case 'm': options.megabytes = strtoul(optarg, NULL, 0); break;
        case 'n': options.mappings = strtoul(optarg, NULL, 0); break;
        case 'r': options.rate = atof(optarg) * 1e6; break;
        case 'w': options.sweep = true; break;
        case 'f': options.fill = fill_of(optarg); break;
        case 't': options.threads = atoi(optarg); break;
        case 's': options.status = optarg; break;
        case 'l': options.log = optarg; break;
        case 'e': options.seconds = atof(optarg); break;
        case 'k': options.working_set = strtoul(optarg, NULL, 0); break;
        case 'p': options.sleepers = atoi(optarg); break;
        case 'c': options.spin = true; break;
        case 'a': options.trace = optarg; break;
        case 'i': options.listen = optarg; break;
        case 'u': options.unsettled = true; break;
        case 'b':
            if (options.file_count == FILES_MAX)
                usage();
            options.files[options.file_count++] = optarg;
            break;
        case 'o': options.open = optarg; break;
        default: usage();
        }
    if (optind != count || options.threads < 1 || options.threads > THREADS_MAX || options.mappings < 1 ||
        options.megabytes * 256 < options.mappings * (size_t)options.threads ||
        options.working_set > options.megabytes || options.working_set * 256 % (size_t)options.threads)
        usage();
}

static void attend(const sigset_t *wanted)
{
    double begin = seconds_of(CLOCK_MONOTONIC);
    for (;;) {
        int number = sigtimedwait(wanted, NULL, &(struct timespec){0, 200000000});
        if (number == SIGTERM || number == SIGINT)
            return;
        if (options.seconds > 0 && seconds_of(CLOCK_MONOTONIC) - begin > options.seconds)
            return;
        if (number == SIGUSR1) {
            status_finish();
            heartbeat_new_window();
        }
        status_write();
    }
}

static void start_company(void)
{
    if (options.spin)
        spin_start();
    if (options.trace)
        trace_start(written);
    else
        heartbeat_start(100);
    if (options.listen)
        echo_start(options.listen);
    if (options.unsettled)
        unsettled_start(options.files, options.file_count, options.open);
    if (options.sleepers)
        sleepers_start(options.sleepers);
}

int main(int count, char **arguments)
{
    static struct writer writers[THREADS_MAX];
    parse(count, arguments);
    status_open("heartbeat", options.status, options.log);
    sigset_t all, wanted;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, NULL);
    sigemptyset(&wanted);
    sigaddset(&wanted, SIGTERM);
    sigaddset(&wanted, SIGINT);
    sigaddset(&wanted, SIGUSR1);
    map_all();
    written = status_counter("pages-written");
    start_company();
    size_t share = (options.working_set ? options.working_set * 256 : pages_total) / (size_t)options.threads;
    for (int i = 0; i < options.threads; i++) {
        writers[i] = (struct writer){.first = (size_t)i * share, .pages = share, .random = {(uint64_t)i + 1}};
        pthread_create(&writers[i].thread, NULL, write_pages, &writers[i]);
    }
    attend(&wanted);
    stopping = true;
    for (int i = 0; i < options.threads; i++)
        pthread_join(writers[i].thread, NULL);
    for (size_t page = 0; page < pages_total; page++)
        check_page(page);
    if (options.trace)
        trace_write(options.trace);
    return status_finish();
}
