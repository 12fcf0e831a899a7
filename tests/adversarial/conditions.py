"""What a command runs under, set in its child before it begins: a kill at a call, another clock or user, no locks."""

import errno
import os
import resource
import signal
import sys
import time

# Calls that change the disk, of which a kill may come before any. Python says so before it makes them.
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def apply(conditions):
    """Set the conditions, by name."""
    for name, value in conditions.items():
        CONDITIONS[name](value)


class Calls:
    """Counts the calls that change files below the current folder, and acts before the n-th, counted from 0.

    The count is kept in a file, one byte a call, so that it outlives the process.
    """

    def __init__(self, n, log, act):
        self.n, self.act, self.made = n, act, 0
        self.log = None if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.root = os.path.join(os.getcwd(), "")
        self.fsync = os.fsync
        os.fsync = self.sync
        sys.addaudithook(self.hook)

    def hook(self, event, arguments):
        if event == "open":
            path, _, flags = arguments
            changes = isinstance(flags, int) and flags & WRITES
        else:
            path, changes = arguments[0] if arguments else None, event in CHANGES
        if changes and isinstance(path, str | bytes | os.PathLike):
            if os.path.abspath(os.fsdecode(path)).startswith(self.root):
                self.count()
            elif event in ("os.remove", "os.rmdir") and not os.path.isabs(os.fsdecode(path)):
                self.count()  # of shutil.rmtree, relative to a folder's descriptor

    def sync(self, descriptor):
        self.count()
        return self.fsync(descriptor)

    def count(self):
        if self.log is not None:
            os.write(self.log, b".")
        self.made += 1
        if self.made - 1 == self.n:
            self.act()


def kill_at(n):
    Calls(n, None, lambda: os.kill(os.getpid(), signal.SIGKILL))


def count_calls(log):
    Calls(-1, log, lambda: None)


def signal_at(value):
    n, number = value
    Calls(n, None, lambda: os.kill(os.getpid(), number))


def fail_at(value):
    """Let the n-th call that changes a file fail, with an error's number."""
    n, number = value

    def fail():
        raise OSError(number, os.strerror(number))

    Calls(n, None, fail)


def no_flock(number):
    """Let a file system have no locks."""
    import fcntl

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    fcntl.flock = refuse


def clock(seconds):
    """Move the clock by so many seconds."""
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + seconds
    time.time_ns = lambda: real_ns() + int(seconds * 1e9)
    import datetime

    class Moved(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(time.time(), tz)

    for module in [m for name, m in sys.modules.items() if name.startswith(("cachefuse", "cli"))]:
        if getattr(module, "datetime", None) is datetime.datetime:
            vars(module)["datetime"] = Moved


def user(number):
    """Be another user, if we may."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(number, number, number)
        os.setresuid(number, number, number)


def files(n):
    resource.setrlimit(resource.RLIMIT_NOFILE, (n, n))


def file_bytes(n):
    """Limit the size of a file that is written."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))


def host(name):
    import socket

    socket.gethostname = lambda: name


def slow(seconds):
    """Wait before each call that changes a file, so that others see what lies between."""
    Calls(-1, None, lambda: None)
    sys.addaudithook(lambda event, _: time.sleep(seconds) if event in CHANGES else None)


def delete_at_read(value):
    """Delete a folder before the n-th file in it is opened."""
    import shutil

    n, folder = value
    opened = []

    def hook(event, arguments):
        path = arguments[0] if arguments else None
        if (
            event == "open"
            and isinstance(path, str | os.PathLike)
            and os.path.abspath(os.fspath(path)).startswith(folder)
        ):
            opened.append(path)
            if len(opened) == n + 1:
                shutil.rmtree(folder, ignore_errors=True)

    sys.addaudithook(hook)


CONDITIONS = {
    "delete_at_read": delete_at_read,
    "kill_at": kill_at,
    "count_calls": count_calls,
    "signal_at": signal_at,
    "fail_at": fail_at,
    "no_flock": no_flock,
    "clock": clock,
    "user": user,
    "files": files,
    "file_bytes": file_bytes,
    "host": host,
    "slow": slow,
}
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK)
