/* Files: offsets, flags and content, of files that have a name and of one that has none any more. */
#define _GNU_SOURCE
#include "check.h"

#include <fcntl.h>
#include <limits.h>
#include <sys/stat.h>

static const char name[] = "files";
enum { PAGES = 64, UMASK = 0027 };

static int regular, twin, append, deleted, null, zero;
static char directory[PATH_MAX], log_path[PATH_MAX];
static uint64_t deleted_seed = 31;

static int open_in(const char *file, int flags)
{
    char path[PATH_MAX + 16];
    snprintf(path, sizeof path, "%s/%s", options.directory, file);
    return (int)need(open(path, flags | O_CREAT | O_TRUNC, 0600), path);
}

static void fill_file(int fd, uint64_t seed, size_t pages)
{
    char page[PAGE];
    for (size_t i = 0; i < pages; i++) {
        pattern_fill(page, PAGE, seed + i);
        expect(name, "pwrite", pwrite(fd, page, PAGE, (off_t)(i * PAGE)), PAGE);
    }
}

static void check_file(int fd, const char *what, uint64_t seed, size_t pages)
{
    char page[PAGE];
    for (size_t i = 0; i < pages; i++) {
        expect(what, "pread", pread(fd, page, PAGE, (off_t)(i * PAGE)), PAGE);
        if (pattern_check(page, PAGE, seed + i) >= 0)
            complain(what, "content of page %zu", i);
    }
}

static void check_flags(int fd, const char *what, int flags, int cloexec)
{
    const int known = O_ACCMODE | O_APPEND | O_NONBLOCK | O_DSYNC | O_NOATIME | O_DIRECT;
    expect(what, "status flags", fcntl(fd, F_GETFL) & known, flags);
    expect(what, "FD_CLOEXEC", fcntl(fd, F_GETFD), cloexec);
}

/* The offset is one for both descriptors, and it stays where it was left. */
static void check_offset(struct random *random)
{
    off_t wanted = (off_t)random_below(random, PAGES * PAGE);
    expect(name, "lseek", lseek(regular, wanted, SEEK_SET), wanted);
    pause_ms(name, 20);
    expect(name, "offset of the dup", lseek(twin, 0, SEEK_CUR), wanted);
    expect(name, "lseek of the dup", lseek(twin, 0, SEEK_SET), 0);
    uint64_t word;
    expect(name, "read", read(regular, &word, 8), 8);
    expect(name, "word read", (long)word, (long)pattern_word(41, 0));
    expect(name, "offset after the read", lseek(twin, 0, SEEK_CUR), 8);
}

static void append_line(uint64_t line)
{
    char text[32];
    int length = snprintf(text, sizeof text, "%08lu\n", line);
    /* O_APPEND: where the offset is does not matter. */
    lseek(append, 0, SEEK_SET);
    expect(name, "append", write(append, text, (size_t)length), length);
}

static void check_log(uint64_t lines)
{
    int fd = open(log_path, O_RDONLY | O_CLOEXEC);
    char text[16] = "";
    expect(name, "length of the log", lseek(fd, 0, SEEK_END), (long)(lines * 9));
    for (uint64_t line = lines > 100 ? lines - 100 : 0; line < lines; line++) {
        expect(name, "pread", pread(fd, text, 9, (off_t)line * 9), 9);
        expect(name, "line of the log", strtol(text, NULL, 10), (long)line);
    }
    close(fd);
}

static void check_deleted(struct random *random)
{
    struct stat about;
    fstat(deleted, &about);
    expect(name, "links of the deleted file", (long)about.st_nlink, 0);
    expect(name, "length of the deleted file", about.st_size, PAGES * PAGE);
    check_file(deleted, "deleted file", deleted_seed, PAGES);
    deleted_seed = random_next(random);
    fill_file(deleted, deleted_seed, PAGES);
}

static void check_place(void)
{
    char now[PATH_MAX];
    if (!getcwd(now, sizeof now) || strcmp(now, directory) != 0)
        complain(name, "the working directory is %s", now);
    mode_t mask = umask(UMASK);
    expect(name, "umask", mask, UMASK);
}

static void check_devices(void)
{
    char bytes[64] = {1};
    expect(name, "/dev/null: read", read(null, bytes, 64), 0);
    expect(name, "/dev/null: write", write(null, bytes, 64), 64);
    expect(name, "/dev/zero: read", read(zero, bytes, 64), 64);
    for (int i = 0; i < 64; i++)
        expect(name, "/dev/zero: byte", bytes[i], 0);
}

static void body(struct worker *self)
{
    struct random random = {8};
    for (uint64_t line = 0; lap(self);) {
        check_offset(&random);
        append_line(line++);
        if (line % 10 == 0) {
            check_log(line);
            check_file(regular, "regular file", 41, PAGES);
            check_deleted(&random);
        }
        check_place();
        check_devices();
        check_flags(regular, "regular file", O_RDWR, 0);
        check_flags(twin, "dup", O_RDWR, FD_CLOEXEC);
        check_flags(append, "log", O_WRONLY | O_APPEND, FD_CLOEXEC);
        check_flags(deleted, "deleted file", O_RDWR, FD_CLOEXEC);
        check_flags(null, "/dev/null", O_RDWR, 0);
        check_flags(zero, "/dev/zero", O_RDONLY, FD_CLOEXEC);
    }
}

static void start(void)
{
    regular = open_in("regular", O_RDWR);
    twin = (int)need(fcntl(regular, F_DUPFD_CLOEXEC, 200), "F_DUPFD"); /* a number far away, too */
    append = open_in("append.log", O_WRONLY | O_APPEND | O_CLOEXEC);
    deleted = open_in("deleted", O_RDWR | O_CLOEXEC);
    null = (int)need(open("/dev/null", O_RDWR), "/dev/null");
    zero = (int)need(open("/dev/zero", O_RDONLY | O_CLOEXEC), "/dev/zero");
    need(realpath(options.directory, directory) ? 0 : -1, options.directory);
    snprintf(log_path, sizeof log_path, "%.4000s/append.log", directory);
    fill_file(regular, 41, PAGES);
    fill_file(deleted, deleted_seed, PAGES);
    char path[PATH_MAX + 16];
    snprintf(path, sizeof path, "%s/deleted", directory);
    need(unlink(path), path);
    need(chdir(directory), directory);
    umask(UMASK);
    spawn(name, body, NULL);
}

static void damage_offset(void)
{
    for (int i = 0; i < 20; i++, usleep(5000))
        lseek(twin, 3, SEEK_CUR);
}

static void damage_log(void)
{
    if (write(append, "lost\n", 5) != 5)
        abort();
}

static void damage_deleted(void)
{
    for (int i = 0; i < 20; i++, usleep(30000))
        if (pwrite(deleted, "x", 1, 999) != 1)
            abort();
}

static void damage_flag(void)
{
    fcntl(null, F_SETFD, FD_CLOEXEC);
}

static void damage_directory(void)
{
    need(chdir("/"), "/");
}

static void damage_umask(void)
{
    umask(0);
}

static const struct breaker breakers[] = {{"offset", damage_offset},   {"append", damage_log},
                                          {"deleted", damage_deleted}, {"cloexec", damage_flag},
                                          {"cwd", damage_directory},   {"umask", damage_umask},
                                          {0}};
const struct checker files_checker = {name, start, breakers};
