/* A library to preload: at the n-th call that changes a file below a folder, the process is killed, or the disk
 * is full from then on.
 *
 *     cc -shared -fPIC -o faults.so faults.c -ldl
 *     LD_PRELOAD=./faults.so python ...          # and from inside: faults_arm("/tmp/run", 17, KILL_BEFORE)
 *
 * What goes through libc is seen: CPython's calls and those of safetensors, which is written in Rust.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL_BEFORE, KILL_AFTER, KILL_WITHIN, DISK_FULL };

static char folder[PATH_MAX];
static long calls, fault_at;
static int mode;

void faults_arm(const char *path, long n, int how) {
    strncpy(folder, path, sizeof folder - 1);
    calls = 0;
    fault_at = n;
    mode = how;
}

long faults_calls(void) { return calls; }

static int below(const char *path) {
    size_t n = strlen(folder);
    return n && !strncmp(path, folder, n) && (path[n] == '/' || path[n] == 0 || path[n] == '.');
}

static int fd_below(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}

static int at_below(int dir, const char *path) {
    char whole[2 * PATH_MAX], cwd[PATH_MAX];
    if (path[0] == '/') return below(path);
    if (dir != AT_FDCWD) return fd_below(dir);
    if (!getcwd(cwd, sizeof cwd)) return 0;
    snprintf(whole, sizeof whole, "%s/%s", cwd, path);
    return below(whole);
}

static void die(void) { kill(getpid(), SIGKILL); }

/* Called before a change: 1 if it must fail, as on a full disk. */
static int fails(int needs_space) {
    ++calls;
    if (calls == fault_at && mode == KILL_BEFORE) die();
    if (mode == DISK_FULL && calls >= fault_at && needs_space) {
        errno = ENOSPC;
        return 1;
    }
    return 0;
}

static void done(void) {
    if (calls == fault_at && (mode == KILL_AFTER || mode == KILL_WITHIN)) die();
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CHANGE(is_below, needs_space, call)               \
    do {                                                  \
        if (!(is_below)) return call;                     \
        if (fails(needs_space)) return -1;                \
        __typeof__(call) result = call;                   \
        done();                                           \
        return result;                                    \
    } while (0)

static int changes(int flags) { return flags & (O_CREAT | O_TRUNC); }
#define MODE(flags) mode_t rights = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { va_list l; va_start(l, flags); rights = va_arg(l, mode_t); va_end(l); }

int open(const char *p, int flags, ...) {
    MODE(flags) CHANGE(changes(flags) && at_below(AT_FDCWD, p), 1, REAL(open)(p, flags, rights));
}
int open64(const char *p, int flags, ...) {
    MODE(flags) CHANGE(changes(flags) && at_below(AT_FDCWD, p), 1, REAL(open64)(p, flags, rights));
}
int openat(int d, const char *p, int flags, ...) {
    MODE(flags) CHANGE(changes(flags) && at_below(d, p), 1, REAL(openat)(d, p, flags, rights));
}
int openat64(int d, const char *p, int flags, ...) {
    MODE(flags) CHANGE(changes(flags) && at_below(d, p), 1, REAL(openat64)(d, p, flags, rights));
}

/* Killed within a write, a process leaves a part of it. */
static size_t part(size_t n) { return calls + 1 == fault_at && mode == KILL_WITHIN ? n / 2 : n; }

ssize_t write(int fd, const void *b, size_t n) {
    CHANGE(fd_below(fd), 1, REAL(write)(fd, b, part(n)));
}
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t at) {
    CHANGE(fd_below(fd), 1, REAL(pwrite64)(fd, b, n, at));
}
ssize_t writev(int fd, const struct iovec *v, int n) { CHANGE(fd_below(fd), 1, REAL(writev)(fd, v, n)); }
ssize_t sendfile64(int out, int in, off64_t *at, size_t n) {
    CHANGE(fd_below(out), 1, REAL(sendfile64)(out, in, at, n));
}
int fsync(int fd) { CHANGE(fd_below(fd), 1, REAL(fsync)(fd)); }
int ftruncate64(int fd, off64_t n) { CHANGE(fd_below(fd), 1, REAL(ftruncate64)(fd, n)); }
int mkdir(const char *p, mode_t m) { CHANGE(at_below(AT_FDCWD, p), 1, REAL(mkdir)(p, m)); }
int rename(const char *a, const char *b) { CHANGE(at_below(AT_FDCWD, b), 1, REAL(rename)(a, b)); }
int link(const char *a, const char *b) { CHANGE(at_below(AT_FDCWD, b), 1, REAL(link)(a, b)); }
int symlink(const char *a, const char *b) { CHANGE(at_below(AT_FDCWD, b), 1, REAL(symlink)(a, b)); }
int unlink(const char *p) { CHANGE(at_below(AT_FDCWD, p), 0, REAL(unlink)(p)); }
int unlinkat(int d, const char *p, int f) { CHANGE(at_below(d, p), 0, REAL(unlinkat)(d, p, f)); }
int rmdir(const char *p) { CHANGE(at_below(AT_FDCWD, p), 0, REAL(rmdir)(p)); }
int chmod(const char *p, mode_t m) { CHANGE(at_below(AT_FDCWD, p), 0, REAL(chmod)(p, m)); }
