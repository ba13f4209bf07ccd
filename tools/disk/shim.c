/* Records and fails the file operations of one process below one folder. Preloaded (LD_PRELOAD); Linux, glibc or musl.
 *
 * `disk_start` selects the folder and the log; until then every call passes through. A record of the log is `struct
 * head`, the path or paths, and the data. Calls that fail change nothing on the disk and are not recorded. One lock is
 * held over each call and its record, so that the log has the order in which the calls took effect.
 *
 * `disk_fail` lets the calls of some kinds pass and then fail, with an errno of the caller's choice.
 *
 * A forked child passes through as well: only the process that called `disk_start` counts.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN = 1, CLOSE, DUP, WRITE, TRUNCATE, SYNC, RENAME, UNLINK, LINK, MKDIR, RMDIR, MAP, MARK };

/* Kinds of calls that can fail; `tools/disk/shim.py` has the same numbers. */
enum {
    K_OPEN = 1, K_WRITE = 2, K_SYNC = 4, K_RENAME = 8, K_MAP = 16, K_TRUNCATE = 32, K_UNLINK = 64, K_MKDIR = 128,
    K_LINK = 256, K_CREATE = 512, K_READ = 1024
};

struct head {
    uint32_t op, first, second; /* of paths: lengths in bytes, after the head */
    int32_t fd, flags;
    int64_t offset;
    uint64_t size; /* of the data, after the paths */
};

#define MAX_FDS 65536
static char tracked[MAX_FDS];
static char root[PATH_MAX];
static size_t root_length;
static int log_fd = -1;
static volatile pid_t process;
static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
#define MAX_KINDS 16
static long counts[MAX_KINDS], calls, fail_after, fail_count, failed;
static int fail_kinds, fail_errno;
static char failed_call[PATH_MAX + 64];

static void *next(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) {
        fprintf(stderr, "shim: no %s\n", name);
        abort();
    }
    return found;
}
#define NEXT(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))next(name)

static int is_on(void) { return process && process == getpid(); }

static void put(const void *data, size_t size) {
    const char *at = data;
    while (size) {
        ssize_t done = syscall(SYS_write, log_fd, at, size);
        if (done <= 0) abort();
        at += done, size -= (size_t)done;
    }
}

static void record(int op, int fd, int flags, int64_t offset, const char *first, const char *second, const void *data,
                   size_t size) {
    if (log_fd < 0) return;
    struct head head = {(uint32_t)op, first ? (uint32_t)strlen(first) : 0, second ? (uint32_t)strlen(second) : 0,
                        fd, flags, offset, size};
    put(&head, sizeof head);
    if (first) put(first, head.first);
    if (second) put(second, head.second);
    if (size) put(data, size);
}

/* The absolute path of `name` without `.`, `..` and double slashes; links are not followed. */
static void absolute(int at, const char *name, char *result) {
    char text[2 * PATH_MAX];
    if (name[0] == '/') {
        snprintf(text, sizeof text, "%s", name);
    } else {
        char base[PATH_MAX] = "";
        if (at == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) base[0] = 0;
        } else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", at);
            ssize_t length = readlink(link, base, sizeof base - 1);
            base[length < 0 ? 0 : length] = 0;
        }
        snprintf(text, sizeof text, "%s/%s", base, name);
    }
    size_t out = 0;
    for (char *at_part = text; *at_part;) {
        while (*at_part == '/') at_part++;
        size_t length = strcspn(at_part, "/");
        if (length == 2 && !strncmp(at_part, "..", 2)) {
            while (out && result[--out] != '/') {}
        } else if (length && !(length == 1 && *at_part == '.') && out + length + 2 < PATH_MAX) {
            result[out++] = '/';
            memcpy(result + out, at_part, length);
            out += length;
        }
        at_part += length;
    }
    result[out] = 0;
}

static int inside(const char *path) {
    return !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static int is_tracked(int fd) { return fd >= 0 && fd < MAX_FDS && tracked[fd]; }

/* Whether this call must fail; counts it. Called with the lock held. */
static int fails(int kind, const char *name, const char *path, int fd) {
    for (int i = 0; i < MAX_KINDS; i++) counts[i] += kind >> i & 1;
    if (!(fail_kinds & kind)) return 0;
    long number = calls++;
    if (number < fail_after || failed >= fail_count) return 0;
    char link[64], found[PATH_MAX] = "";
    if (!path) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t length = readlink(link, found, sizeof found - 1);
        found[length < 0 ? 0 : length] = 0;
        path = found;
    }
    if (!failed++) snprintf(failed_call, sizeof failed_call, "%s %s", name, inside(path) ? path + root_length : path);
    errno = fail_errno;
    return 1;
}

/* --- what the tool calls ------------------------------------------------------------------------------------- */

int disk_start(const char *folder, const char *log) {
    pthread_mutex_lock(&lock);
    snprintf(root, sizeof root, "%s", folder);
    root_length = strlen(root);
    memset(tracked, 0, sizeof tracked);
    memset(counts, 0, sizeof counts);
    log_fd = *log ? (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
    process = getpid();
    pthread_mutex_unlock(&lock);
    return *log && log_fd < 0 ? -1 : 0;
}

void disk_stop(void) {
    pthread_mutex_lock(&lock);
    process = 0;
    if (log_fd >= 0) syscall(SYS_close, log_fd);
    log_fd = -1;
    pthread_mutex_unlock(&lock);
}

void disk_mark(const char *text) {
    pthread_mutex_lock(&lock);
    if (is_on()) record(MARK, -1, 0, 0, NULL, NULL, text, strlen(text));
    pthread_mutex_unlock(&lock);
}

/* Let `after` calls of `kinds` pass and fail the next `count` ones with `error`; counts calls from 0 again. */
void disk_fail(int kinds, long after, long count, int error) {
    pthread_mutex_lock(&lock);
    fail_kinds = kinds, fail_after = after, fail_count = count, fail_errno = error;
    calls = failed = 0;
    failed_call[0] = 0;
    pthread_mutex_unlock(&lock);
}

/* Stop failing, as if room had been made; the counts stay. */
void disk_heal(void) { fail_count = 0; }

/* Number of calls of one kind since `disk_start`. */
long disk_calls(int kind) {
    for (int i = 0; i < MAX_KINDS; i++)
        if (kind == 1 << i) return counts[i];
    return 0;
}
long disk_failed(void) { return failed; }
const char *disk_failed_call(void) { return failed_call; }

/* --- open and close -------------------------------------------------------------------------------------------- */

static int open_any(int at, const char *name, int flags, mode_t mode) {
    static int (*real)(int, const char *, int, ...);
    if (!real) real = (int (*)(int, const char *, int, ...))next("openat64");
    if (!is_on()) return real(at, name, flags, mode);
    char path[PATH_MAX];
    absolute(at, name, path);
    if (!inside(path)) return real(at, name, flags, mode);
    pthread_mutex_lock(&lock);
    int fd = -1;
    struct stat before;
    int is_new = (flags & O_CREAT) && lstat(path, &before) != 0;
    if (!fails(is_new ? K_OPEN | K_CREATE : K_OPEN, "open", path, -1)) {
        fd = real(at, name, flags, mode);
        if (fd >= 0 && fd < MAX_FDS) {
            int saved = errno;
            tracked[fd] = 1;
            record(OPEN, fd, flags, is_new, path, NULL, NULL, 0);
            errno = saved;
        }
    }
    pthread_mutex_unlock(&lock);
    return fd;
}

#define MODE_OF(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { \
        va_list list; \
        va_start(list, flags); \
        mode = (mode_t)va_arg(list, int); \
        va_end(list); \
    }
int open(const char *name, int flags, ...) { MODE_OF(flags) return open_any(AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { MODE_OF(flags) return open_any(AT_FDCWD, name, flags, mode); }
int openat(int at, const char *name, int flags, ...) { MODE_OF(flags) return open_any(at, name, flags, mode); }
int openat64(int at, const char *name, int flags, ...) { MODE_OF(flags) return open_any(at, name, flags, mode); }
int creat(const char *name, mode_t mode) { return open_any(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *name, mode_t mode) { return open_any(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int __open_2(const char *name, int flags) { return open_any(AT_FDCWD, name, flags, 0); }
int __open64_2(const char *name, int flags) { return open_any(AT_FDCWD, name, flags, 0); }

int close(int fd) {
    NEXT(int, "close", int);
    if (!is_on() || !is_tracked(fd)) return real(fd);
    pthread_mutex_lock(&lock);
    tracked[fd] = 0;
    record(CLOSE, fd, 0, 0, NULL, NULL, NULL, 0);
    int result = real(fd);
    pthread_mutex_unlock(&lock);
    return result;
}

static int duplicated(int old, int new) {
    if (new >= 0 && new < MAX_FDS && is_on()) {
        pthread_mutex_lock(&lock);
        if (is_tracked(old)) record(DUP, old, new, 0, NULL, NULL, NULL, 0);
        else if (tracked[new]) record(CLOSE, new, 0, 0, NULL, NULL, NULL, 0);
        tracked[new] = (char)is_tracked(old);
        pthread_mutex_unlock(&lock);
    }
    return new;
}
int dup(int old) { NEXT(int, "dup", int); return duplicated(old, real(old)); }
int dup2(int old, int new) { NEXT(int, "dup2", int, int); return duplicated(old, real(old, new)); }
int dup3(int old, int new, int flags) { NEXT(int, "dup3", int, int, int); return duplicated(old, real(old, new, flags)); }

static int control(int fd, int command, void *value) {
    static int (*real)(int, int, ...);
    if (!real) real = (int (*)(int, int, ...))next("fcntl64");
    int result = real(fd, command, value);
    return command == F_DUPFD || command == F_DUPFD_CLOEXEC ? duplicated(fd, result) : result;
}
#define FCNTL(name) \
    int name(int fd, int command, ...) { \
        va_list list; \
        va_start(list, command); \
        void *value = va_arg(list, void *); \
        va_end(list); \
        return control(fd, command, value); \
    }
FCNTL(fcntl)
FCNTL(fcntl64)

/* --- contents -------------------------------------------------------------------------------------------------- */

ssize_t read(int fd, void *data, size_t size) {
    NEXT(ssize_t, "read", int, void *, size_t);
    if (!is_on() || !is_tracked(fd)) return real(fd, data, size);
    pthread_mutex_lock(&lock);
    ssize_t done = fails(K_READ, "read", NULL, fd) ? -1 : real(fd, data, size);
    pthread_mutex_unlock(&lock);
    return done;
}

static ssize_t read_at(int fd, void *data, size_t size, int64_t offset) {
    NEXT(ssize_t, "pread64", int, void *, size_t, off64_t);
    if (!is_on() || !is_tracked(fd)) return real(fd, data, size, offset);
    pthread_mutex_lock(&lock);
    ssize_t done = fails(K_READ, "pread", NULL, fd) ? -1 : real(fd, data, size, offset);
    pthread_mutex_unlock(&lock);
    return done;
}
ssize_t pread(int fd, void *data, size_t size, off_t offset) { return read_at(fd, data, size, offset); }
ssize_t pread64(int fd, void *data, size_t size, off64_t offset) { return read_at(fd, data, size, offset); }
/* What programs that check the size of their buffers call instead. */
ssize_t __read_chk(int fd, void *data, size_t size, size_t room) {
    if (size > room) abort();
    return read(fd, data, size);
}
ssize_t __pread_chk(int fd, void *data, size_t size, off_t offset, size_t room) {
    if (size > room) abort();
    return read_at(fd, data, size, offset);
}
ssize_t __pread64_chk(int fd, void *data, size_t size, off64_t offset, size_t room) {
    if (size > room) abort();
    return read_at(fd, data, size, offset);
}

static int64_t place(int fd) {
    if (fcntl(fd, F_GETFL) & O_APPEND) {
        struct stat about;
        return fstat(fd, &about) ? 0 : about.st_size;
    }
    return lseek(fd, 0, SEEK_CUR);
}

ssize_t write(int fd, const void *data, size_t size) {
    NEXT(ssize_t, "write", int, const void *, size_t);
    if (!is_on() || !is_tracked(fd)) return real(fd, data, size);
    pthread_mutex_lock(&lock);
    ssize_t done = -1;
    if (!fails(K_WRITE, "write", NULL, fd)) {
        int64_t offset = place(fd);
        done = real(fd, data, size);
        if (done > 0) record(WRITE, fd, 0, offset, NULL, NULL, data, (size_t)done);
    }
    pthread_mutex_unlock(&lock);
    return done;
}

static ssize_t write_at(int fd, const void *data, size_t size, int64_t offset) {
    NEXT(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    if (!is_on() || !is_tracked(fd)) return real(fd, data, size, offset);
    pthread_mutex_lock(&lock);
    ssize_t done = -1;
    if (!fails(K_WRITE, "pwrite", NULL, fd)) {
        done = real(fd, data, size, offset);
        if (done > 0) record(WRITE, fd, 0, offset, NULL, NULL, data, (size_t)done);
    }
    pthread_mutex_unlock(&lock);
    return done;
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return write_at(fd, data, size, offset); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) { return write_at(fd, data, size, offset); }

ssize_t writev(int fd, const struct iovec *parts, int count) {
    NEXT(ssize_t, "writev", int, const struct iovec *, int);
    if (!is_on() || !is_tracked(fd)) return real(fd, parts, count);
    ssize_t total = 0;
    for (int i = 0; i < count; i++) {
        ssize_t done = write(fd, parts[i].iov_base, parts[i].iov_len);
        if (done < 0) return total ? total : done;
        total += done;
        if ((size_t)done < parts[i].iov_len) break;
    }
    return total;
}

/* Callers fall back to reading and writing. */
ssize_t sendfile64(int out, int in, off64_t *offset, size_t count) {
    NEXT(ssize_t, "sendfile64", int, int, off64_t *, size_t);
    if (!is_on() || !is_tracked(out)) return real(out, in, offset, count);
    errno = ENOTSOCK;
    return -1;
}
ssize_t sendfile(int out, int in, off_t *offset, size_t count) { return sendfile64(out, in, (off64_t *)offset, count); }
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t count, unsigned flags) {
    NEXT(ssize_t, "copy_file_range", int, off64_t *, int, off64_t *, size_t, unsigned);
    if (!is_on() || !is_tracked(out)) return real(in, from, out, to, count, flags);
    errno = ENOSYS;
    return -1;
}

int ftruncate64(int fd, off64_t size) {
    NEXT(int, "ftruncate64", int, off64_t);
    if (!is_on() || !is_tracked(fd)) return real(fd, size);
    pthread_mutex_lock(&lock);
    int result = -1;
    if (!fails(K_TRUNCATE, "ftruncate", NULL, fd) && !(result = real(fd, size)))
        record(TRUNCATE, fd, 0, size, NULL, NULL, NULL, 0);
    pthread_mutex_unlock(&lock);
    return result;
}
int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

int truncate64(const char *name, off64_t size) {
    int fd = open(name, O_WRONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    int result = ftruncate64(fd, size);
    close(fd);
    return result;
}
int truncate(const char *name, off_t size) { return truncate64(name, size); }

/* Only what enlarges the file: enough for SQLite and Python. */
static int allocate(int fd, off64_t offset, off64_t size) {
    struct stat about;
    if (fstat(fd, &about)) return errno;
    return offset + size > about.st_size && ftruncate64(fd, offset + size) ? errno : 0;
}
int posix_fallocate64(int fd, off64_t offset, off64_t size) {
    NEXT(int, "posix_fallocate64", int, off64_t, off64_t);
    return is_on() && is_tracked(fd) ? allocate(fd, offset, size) : real(fd, offset, size);
}
int posix_fallocate(int fd, off_t offset, off_t size) { return posix_fallocate64(fd, offset, size); }
int fallocate64(int fd, int mode, off64_t offset, off64_t size) {
    NEXT(int, "fallocate64", int, int, off64_t, off64_t);
    if (!is_on() || !is_tracked(fd)) return real(fd, mode, offset, size);
    errno = EOPNOTSUPP;
    return -1;
}
int fallocate(int fd, int mode, off_t offset, off_t size) { return fallocate64(fd, mode, offset, size); }

static int sync_any(int fd, int (*real)(int), const char *name) {
    if (!is_on() || !is_tracked(fd)) return real(fd);
    pthread_mutex_lock(&lock);
    int result = -1;
    if (!fails(K_SYNC, name, NULL, fd) && !(result = real(fd))) record(SYNC, fd, 0, 0, NULL, NULL, NULL, 0);
    pthread_mutex_unlock(&lock);
    return result;
}
int fsync(int fd) { NEXT(int, "fsync", int); return sync_any(fd, real, "fsync"); }
int fdatasync(int fd) { NEXT(int, "fdatasync", int); return sync_any(fd, real, "fdatasync"); }

void *mmap64(void *address, size_t size, int protection, int flags, int fd, off64_t offset) {
    NEXT(void *, "mmap64", void *, size_t, int, int, int, off64_t);
    if (!is_on() || (flags & MAP_ANONYMOUS) || !is_tracked(fd)) return real(address, size, protection, flags, fd, offset);
    pthread_mutex_lock(&lock);
    void *result = MAP_FAILED;
    if (!fails(K_MAP, "mmap", NULL, fd)) {
        result = real(address, size, protection, flags, fd, offset);
        if (result != MAP_FAILED && (flags & MAP_SHARED) && (protection & PROT_WRITE))
            record(MAP, fd, 0, offset, NULL, NULL, NULL, 0);
    }
    pthread_mutex_unlock(&lock);
    return result;
}
void *mmap(void *address, size_t size, int protection, int flags, int fd, off_t offset) {
    return mmap64(address, size, protection, flags, fd, offset);
}

/* --- names ----------------------------------------------------------------------------------------------------- */

#define LINK_TYPE int, const char *, int, const char *, int
static int two_names(int op, int kind, const char *call, int from_at, const char *from, int to_at, const char *to,
                     int flags) {
    static int (*real_rename)(int, const char *, int, const char *, unsigned);
    static int (*real_link)(LINK_TYPE);
    if (!real_rename) real_rename = (int (*)(int, const char *, int, const char *, unsigned))next("renameat2");
    if (!real_link) real_link = (int (*)(LINK_TYPE))next("linkat");
    char first[PATH_MAX] = "", second[PATH_MAX] = "";
    int watched = 0;
    if (is_on()) {
        absolute(from_at, from, first);
        absolute(to_at, to, second);
        watched = inside(first) || inside(second);
    }
    int result = -1;
    if (watched) pthread_mutex_lock(&lock);
    if (!watched || !fails(kind, call, second, -1))
        result = op == RENAME ? real_rename(from_at, from, to_at, to, (unsigned)flags)
                              : real_link(from_at, from, to_at, to, flags);
    if (watched) {
        if (!result) record(op, -1, flags, 0, first, second, NULL, 0);
        pthread_mutex_unlock(&lock);
    }
    return result;
}
int rename(const char *from, const char *to) {
    return two_names(RENAME, K_RENAME, "rename", AT_FDCWD, from, AT_FDCWD, to, 0);
}
int renameat(int from_at, const char *from, int to_at, const char *to) {
    return two_names(RENAME, K_RENAME, "rename", from_at, from, to_at, to, 0);
}
int renameat2(int from_at, const char *from, int to_at, const char *to, unsigned flags) {
    return two_names(RENAME, K_RENAME, "rename", from_at, from, to_at, to, (int)flags);
}
int link(const char *from, const char *to) { return two_names(LINK, K_LINK, "link", AT_FDCWD, from, AT_FDCWD, to, 0); }
int linkat(int from_at, const char *from, int to_at, const char *to, int flags) {
    return two_names(LINK, K_LINK, "link", from_at, from, to_at, to, flags);
}

static int one_name(int op, int kind, const char *call, int at, const char *name, int flags) {
    NEXT(int, "unlinkat", int, const char *, int);
    static int (*real_mkdir)(int, const char *, mode_t);
    if (!real_mkdir) real_mkdir = (int (*)(int, const char *, mode_t))next("mkdirat");
    char path[PATH_MAX] = "";
    int watched = 0;
    if (is_on()) {
        absolute(at, name, path);
        watched = inside(path);
    }
    int result = -1;
    if (watched) pthread_mutex_lock(&lock);
    if (!watched || !fails(kind, call, path, -1))
        result = op == MKDIR ? real_mkdir(at, name, (mode_t)flags) : real(at, name, flags);
    if (watched) {
        if (!result) record(op, -1, 0, 0, path, NULL, NULL, 0);
        pthread_mutex_unlock(&lock);
    }
    return result;
}
int unlink(const char *name) { return one_name(UNLINK, K_UNLINK, "unlink", AT_FDCWD, name, 0); }
int rmdir(const char *name) { return one_name(RMDIR, K_UNLINK, "rmdir", AT_FDCWD, name, AT_REMOVEDIR); }
int unlinkat(int at, const char *name, int flags) {
    return one_name(flags & AT_REMOVEDIR ? RMDIR : UNLINK, K_UNLINK, "unlink", at, name, flags);
}
int mkdir(const char *name, mode_t mode) { return one_name(MKDIR, K_MKDIR, "mkdir", AT_FDCWD, name, (int)mode); }
int mkdirat(int at, const char *name, mode_t mode) { return one_name(MKDIR, K_MKDIR, "mkdir", at, name, (int)mode); }
