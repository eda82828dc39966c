/* Many clients of an echo server, each with one connection that it never renews: every so often it sends a request and
 * waits for the answer. The longest wait is what a client felt of a move; a wrong answer or a lost connection is a
 * complaint. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "common/pattern.h"
#include "common/status.h"

enum { EVENTS = 64, CONNECTIONS_MAX = 20000 };

static struct {
    const char *status, *log, *address;
    int port, connections;
    double interval; /* seconds between two requests of one client */
} options = {.connections = 1, .interval = 1};

struct client {
    int fd;
    uint64_t request; /* the last one sent */
    double sent;      /* when; 0 while none is under way */
    double due;       /* when the next one is */
};

static struct client *clients;
static counter_t *requests, *answers, *longest_us, *longest_at_us;

static double now(void)
{
    return seconds_of(CLOCK_REALTIME);
}

static int connect_one(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)options.port)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (inet_pton(AF_INET, options.address, &address.sin_addr) != 1 ||
        connect(fd, (struct sockaddr *)&address, sizeof address) < 0) {
        perror(options.address);
        exit(2);
    }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    return fd;
}

static void connect_all(int epoll)
{
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    clients = calloc((size_t)options.connections, sizeof *clients);
    for (int i = 0; i < options.connections; i++) {
        clients[i].fd = connect_one();
        clients[i].due = now() + options.interval * i / options.connections;
        struct epoll_event event = {.events = EPOLLIN, .data.u32 = (uint32_t)i};
        epoll_ctl(epoll, EPOLL_CTL_ADD, clients[i].fd, &event);
    }
}

static void lose(struct client *client, const char *how)
{
    complain("callers", "client %ld lost its connection: %s", client - clients, how);
    close(client->fd);
    client->fd = -1;
}

static void ask(struct client *client)
{
    client->request = mix(client->request + (uint64_t)(client - clients) + 1);
    client->sent = now();
    client->due += options.interval;
    if (client->due < client->sent)
        client->due = client->sent + options.interval;
    if (write(client->fd, &client->request, sizeof client->request) != sizeof client->request)
        lose(client, strerror(errno));
    atomic_fetch_add(requests, 1);
}

/* The answer; it is short enough to come in one piece. */
static void hear(struct client *client)
{
    uint64_t answer = 0;
    ssize_t length = read(client->fd, &answer, sizeof answer);
    if (length <= 0) {
        lose(client, length ? strerror(errno) : "end of file");
        return;
    }
    double at = now();
    if (length != sizeof answer || answer != client->request || client->sent == 0)
        complain("callers", "client %ld got a wrong answer of %zd bytes", client - clients, length);
    uint64_t waited = (uint64_t)((at - client->sent) * 1e6);
    if (waited > *longest_us) {
        *longest_us = waited;
        *longest_at_us = (uint64_t)(at * 1e6);
    }
    client->sent = 0;
    atomic_fetch_add(answers, 1);
}

/* Who has to send next, in turn: they are due one after another. */
static void ask_due(double at)
{
    for (int i = 0; i < options.connections; i++)
        if (clients[i].fd >= 0 && clients[i].sent == 0 && clients[i].due <= at)
            ask(&clients[i]);
}

static bool signalled(const sigset_t *wanted)
{
    int number = sigtimedwait(wanted, NULL, &(struct timespec){0});
    if (number == SIGUSR1)
        *longest_us = 0;
    return number == SIGTERM || number == SIGINT;
}

static void converse(int epoll, const sigset_t *wanted)
{
    struct epoll_event ready[EVENTS];
    double status_due = 0;
    while (!signalled(wanted)) {
        int count = epoll_wait(epoll, ready, EVENTS, 1);
        for (int i = 0; i < count; i++)
            if (clients[ready[i].data.u32].fd >= 0)
                hear(&clients[ready[i].data.u32]);
        double at = now();
        ask_due(at);
        if (at > status_due) {
            status_write();
            status_due = at + 0.1;
        }
    }
}

static void usage(void)
{
    fputs("usage: callers ADDRESS PORT [--connections N] [--interval S] [--status FILE] [--log FILE]\n"
          "SIGUSR1 starts a new window for the longest wait; SIGTERM ends it. Counters: longest-us, longest-at-us.\n",
          stderr);
    exit(2);
}

static void parse(int count, char **arguments)
{
    static const struct option known[] = {
        {"connections", 1, 0, 'c'}, {"interval", 1, 0, 'i'}, {"status", 1, 0, 's'}, {"log", 1, 0, 'l'}, {0}};
    for (int option; (option = getopt_long(count, arguments, "", known, NULL)) != -1;)
        switch (option) {
        case 'c': options.connections = atoi(optarg); break;
        case 'i': options.interval = atof(optarg); break;
        case 's': options.status = optarg; break;
        case 'l': options.log = optarg; break;
        default: usage();
        }
    if (count != optind + 2 || options.connections < 1 || options.connections > CONNECTIONS_MAX ||
        options.interval <= 0)
        usage();
    options.address = arguments[optind];
    options.port = atoi(arguments[optind + 1]);
}

int main(int count, char **arguments)
{
    sigset_t wanted;
    parse(count, arguments);
    status_open("callers", options.status, options.log);
    sigemptyset(&wanted);
    sigaddset(&wanted, SIGTERM);
    sigaddset(&wanted, SIGINT);
    sigaddset(&wanted, SIGUSR1);
    sigprocmask(SIG_BLOCK, &wanted, NULL);
    signal(SIGPIPE, SIG_IGN);
    requests = status_counter("requests");
    answers = status_counter("answers");
    longest_us = status_counter("longest-us");
    longest_at_us = status_counter("longest-at-us");
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    connect_all(epoll);
    converse(epoll, &wanted);
    return status_finish();
}
