/* Who the process is: numbers, names, credentials, limits, scheduling, its rseq area, arguments and environment. */
#define _GNU_SOURCE
#include "check.h"

#include <limits.h>
#include <sched.h>
#include <sys/auxv.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/rseq.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <grp.h>

static const char name[] = "identity";
extern char **environ;

enum { GROUPS = 64, AUXV = 64, NICE = 3, SLACK = 61000 };

/* Everything that is compared as a whole: taken once at the start, and again in every round. */
struct identity {
    pid_t pid, tid;
    uid_t uid[3];
    gid_t gid[3];
    int group_count;
    gid_t groups[GROUPS];
    uint32_t capabilities[6];
    int bounding[41];
    int secure_bits, no_new_privileges, dumpable, death_signal, subreaper, keep_capabilities, timer_slack;
    int policy, nice;
    struct rlimit limits[RLIM_NLIMITS];
    char comm[16], exe[PATH_MAX];
    unsigned long auxv[AUXV];
    uint8_t random[16];
    uint64_t arguments;
};

static uint64_t digest_of_environment(void)
{
    uint64_t digest = 0;
    for (char **entry = environ; *entry; entry++)
        for (const char *at = *entry; *at; at++)
            digest = mix(digest ^ (uint8_t)*at);
    return digest;
}

static void read_capabilities(struct identity *now)
{
    struct {
        uint32_t version;
        int pid;
    } header = {0x20080522, 0}; /* _LINUX_CAPABILITY_VERSION_3, capget(2) */
    syscall(SYS_capget, &header, now->capabilities);
    for (int i = 0; i < 41; i++)
        now->bounding[i] = prctl(PR_CAPBSET_READ, i);
    now->secure_bits = prctl(PR_GET_SECUREBITS);
    now->no_new_privileges = prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0);
    now->keep_capabilities = prctl(PR_GET_KEEPCAPS);
}

static void read_credentials(struct identity *now)
{
    getresuid(&now->uid[0], &now->uid[1], &now->uid[2]);
    getresgid(&now->gid[0], &now->gid[1], &now->gid[2]);
    now->group_count = getgroups(GROUPS, now->groups);
    read_capabilities(now);
}

static void read_process(struct identity *now)
{
    now->pid = getpid();
    now->tid = gettid();
    now->dumpable = prctl(PR_GET_DUMPABLE);
    prctl(PR_GET_PDEATHSIG, &now->death_signal);
    prctl(PR_GET_CHILD_SUBREAPER, &now->subreaper);
    now->timer_slack = prctl(PR_GET_TIMERSLACK);
    now->policy = sched_getscheduler(0);
    now->nice = getpriority(PRIO_PROCESS, (id_t)gettid());
    for (int i = 0; i < RLIM_NLIMITS; i++)
        getrlimit((__rlimit_resource_t)i, &now->limits[i]);
    prctl(PR_GET_NAME, now->comm);
    if (readlink("/proc/self/exe", now->exe, sizeof now->exe - 1) < 0)
        snprintf(now->exe, sizeof now->exe, "%s", strerror(errno));
}

static void take(struct identity *now)
{
    memset(now, 0, sizeof *now);
    read_credentials(now);
    read_process(now);
    for (unsigned long i = 0; i < AUXV; i++)
        now->auxv[i] = getauxval(i);
    memcpy(now->random, (const void *)getauxval(AT_RANDOM), sizeof now->random);
    now->arguments = digest_of_environment();
}

static void compare(const struct identity *now, const struct identity *was)
{
#define SAME(field)                                                                                                    \
    if (memcmp(&now->field, &was->field, sizeof now->field) != 0)                                                      \
    complain(name, "%s changed", #field)
    SAME(pid);
    SAME(tid);
    SAME(uid);
    SAME(gid);
    SAME(group_count);
    SAME(groups);
    SAME(capabilities);
    SAME(bounding);
    SAME(secure_bits);
    SAME(no_new_privileges);
    SAME(dumpable);
    SAME(death_signal);
    SAME(subreaper);
    SAME(keep_capabilities);
    SAME(timer_slack);
    SAME(policy);
    SAME(nice);
    SAME(limits);
    SAME(comm);
    SAME(exe);
    SAME(auxv);
    SAME(random);
    SAME(arguments);
#undef SAME
}

static void set_apart(void)
{
    struct sched_param none = {0};
    prctl(PR_SET_NAME, "self \"check\")");
    prctl(PR_SET_TIMERSLACK, SLACK);
    prctl(PR_SET_PDEATHSIG, SIGHUP);
    setpriority(PRIO_PROCESS, (id_t)gettid(), NICE);
    need(sched_setscheduler(0, SCHED_BATCH, &none), "sched_setscheduler");
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = 777;
    need(setrlimit(RLIMIT_NOFILE, &files), "setrlimit");
}

static void body(struct worker *self)
{
    static struct identity was, now;
    set_apart();
    take(&was);
    while (lap(self)) {
        take(&now);
        compare(&now, &was);
        pause_ms(self->name, 50);
    }
}

/* ---- restartable sequences: where the kernel keeps telling a thread which processor it is on */
static struct rseq *rseq_area(void)
{
    return (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
}

static atomic_bool forget;

static void drop_registration(void)
{
    unsigned size = __rseq_size < 32 ? 32 : __rseq_size;
    need(syscall(SYS_rseq, rseq_area(), size, RSEQ_FLAG_UNREGISTER, RSEQ_SIG), "rseq");
}

static void check_rseq(struct worker *self)
{
    cpu_set_t allowed, one, now;
    sched_getaffinity(0, sizeof allowed, &allowed);
    for (int cpu = 0; lap(self); cpu = (cpu + 1) % CPU_SETSIZE) {
        if (!CPU_ISSET(cpu, &allowed))
            continue;
        bool yes = true;
        if (atomic_compare_exchange_strong(&forget, &yes, false))
            drop_registration();
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        expect(self->name, "sched_setaffinity", sched_setaffinity(0, sizeof one, &one), 0);
        for (int i = 0; i < 10; i++, pause_ms(self->name, 5)) {
            expect(self->name, "processor in the rseq area", (int)*(volatile uint32_t *)&rseq_area()->cpu_id, cpu);
            expect(self->name, "sched_getcpu", sched_getcpu(), cpu);
        }
        sched_getaffinity(0, sizeof now, &now);
        expect(self->name, "affinity", CPU_EQUAL(&now, &one), true);
    }
}

static void start(void)
{
    spawn(name, body, NULL);
    if (__rseq_size > 0) /* 0: this kernel or this environment has none */
        spawn("rseq", check_rseq, NULL);
}

static void damage_limit(void)
{
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur--;
    setrlimit(RLIMIT_NOFILE, &files);
}

static void damage_environment(void)
{
    putenv("SELFCHECK=damaged");
}

static void damage_rseq(void)
{
    forget = true;
}

static const struct breaker breakers[] = {
    {"limit", damage_limit}, {"environment", damage_environment}, {"rseq", damage_rseq}, {0}};
const struct checker identity_checker = {name, start, breakers};
