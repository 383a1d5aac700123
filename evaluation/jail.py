"""One program that nobody trusts, run where it can do no harm; started by `sandbox.py`, by path, as `python -I -S jail.py SECONDS`.

    stdin   {"candidates": [source, ...], "test": source, "entry_point": name}: the first candidate that compiles is run, then the test
    stdout  {"kind": one of sandbox.KINDS, "detail": text}, or nothing where this machine allows no such place: stderr then says why

Four processes, so that nothing is left and nothing is forged:

    keeper  in namespaces of its own (user, mount, pid, net, ipc, uts); keeps the time, says the verdict
    init    process 1 of the pid namespace: when it ends, the kernel kills whatever was started in there, detached or not
    run     `python -I -S` without capabilities, environment, network, /proc or /dev; sees the interpreter and system libraries, read-only,
            and an empty /work in memory
    mapper  writes the user namespace's map from outside, and ends

Imports nothing of the package, which isn't there on the inside. Leaves out: limits on the sum of all processes (cgroups need the
administrator): PROCESSES times MEMORY bounds it. A program that knows this file could still write its own verdict.
"""

import ctypes
import fcntl
import json
import os
import resource
import signal
import sys
from collections.abc import Callable

MEMORY = 512 << 20  # bytes of address space, a process
PROCESSES = 8  # threads count, and so do the keeper and init; before Linux 5.14 also what the user runs elsewhere
FILES = 64  # open at once
FILE, DISK = 4 << 20, 16 << 20  # bytes of one file, of all in /work
SEEN = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache")  # beside the interpreter's own folder
PATIENCE = 6  # seconds by the clock for each second of CPU: a busy machine fails no program
INSIDE = 1000  # the user's id in there
NOBODY = 65534  # whom it is outside, where root runs this: limits on processes don't bind root

NEW = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000  # CLONE_NEWUSER, NS, PID, NET, IPC, UTS
READ_ONLY, NO_SETUID, NO_DEVICE, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18  # MS_*
DETACH, PARENT_DEATH, NO_NEW_PRIVILEGES = 2, 1, 38  # MNT_DETACH, PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS

# What `run` does. The verdict goes to descriptor 3. The word that makes it "passed" waits in descriptor 4: it is in no variable that
# the program could meet, and a program that ends early never gets to read it.
RUN = """
import json, os, sys
read, write, leave = os.read, os.write, os._exit
def say(kind, detail=""):
    write(3, json.dumps({"kind": kind, "detail": detail[:200]}).encode() + b"\\n")
    leave(0)
def compiled(source, name):
    try:
        return compile(source, name, "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
task = json.load(sys.stdin)
program = next(filter(None, (compiled(source, "program") for source in task["candidates"])), None)
if program is None:
    say("unparsable")
space = {"__name__": "program"}
try:
    exec(program, space)
    exec(compile(task["test"], "test", "exec"), space)
    space["check"](space[task["entry_point"]])
except AssertionError as error:
    say("wrong", str(error))
except MemoryError:
    say("memory")
except BaseException as error:
    say("error", f"{type(error).__name__}: {error}")
say(read(4, 64).decode())
"""


def main(seconds: int) -> None:
    die_with_parent()
    libc = ctypes.CDLL(None, use_errno=True)
    nothing = os.open(os.devnull, os.O_RDWR)
    enter(libc)
    word = os.urandom(16).hex()
    (said, verdict), (kept, keep) = os.pipe(), os.pipe()
    os.write(keep, word.encode())
    os.close(keep)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    init = os.fork()
    if not init:
        guarded(lambda: be_init(nothing, verdict, kept, seconds))
    os.close(verdict)
    late = signal.sigtimedwait({signal.SIGCHLD}, PATIENCE * seconds) is None
    if late:
        os.kill(init, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(init, 0)[1])  # returns when all inside are gone
    print(json.dumps(judged(late, code, os.read(said, 4096), word)), flush=True)


def judged(late: bool, code: int, said: bytes, word: str) -> dict[str, str]:
    """code: of init, 128 + n where a signal ended the program."""
    if late or code == 128 + signal.SIGXCPU:
        return {"kind": "timeout", "detail": ""}
    try:
        verdict = json.loads(said.split(b"\n")[0])  # the first word counts, if the program multiplied itself
        kind, detail = str(verdict["kind"]), str(verdict["detail"])
    except (ValueError, TypeError, KeyError):
        how = f"signal {code - 128}" if code > 128 else f"exit code {code}"
        return {"kind": "error", "detail": f"it ended with {how} before its tests did"}
    if kind == "start":
        raise OSError(f"the program was not started: {detail}")
    if kind == word:
        return {"kind": "passed", "detail": ""}
    return {"kind": kind if kind in ("wrong", "error", "memory", "unparsable") else "error", "detail": detail}


def enter(libc: ctypes.CDLL) -> None:
    """Into namespaces of our own, with a root folder that holds SEEN and the interpreter, as a user without rights. Raises OSError."""
    root = os.geteuid() == 0
    us = os.getpid()
    wait, go = os.pipe()
    mapper = os.fork()
    if not mapper:
        os.close(go)  # so that the read ends if we do
        guarded(lambda: os.read(wait, 1) and map_users(us, root))
    checked(libc.unshare(NEW), "unshare")
    os.write(go, b"x")
    if os.waitpid(mapper, 0)[1]:
        raise PermissionError("the user namespace could not be given a user")
    mount(libc, None, "/", RECURSIVE | PRIVATE)
    prison = "/proc"  # a folder that is always there, and none that holds a Python; seen so by this process alone
    mount(libc, "tmpfs", prison, NO_SETUID | NO_DEVICE, "size=1m,mode=755", kind="tmpfs")
    for path in dict.fromkeys((*SEEN, sys.base_prefix, sys.base_exec_prefix)):
        show(libc, path, prison + path)
    os.mkdir(f"{prison}/work")
    mount(libc, "tmpfs", f"{prison}/work", NO_SETUID | NO_DEVICE, f"size={DISK},nr_inodes=1k,mode=777", kind="tmpfs")
    os.chdir(prison)
    checked(libc.pivot_root(b".", b"."), "pivot_root")
    checked(libc.umount2(b".", DETACH), "umount")
    mount(libc, None, "/", REMOUNT | BIND | READ_ONLY | NO_SETUID | NO_DEVICE)
    os.chdir("/work")
    if root:
        os.setgroups([])
        os.setresgid(INSIDE, INSIDE, INSIDE)
        os.setresuid(INSIDE, INSIDE, INSIDE)
    die_with_parent()  # again: a change of user undoes it
    checked(libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")


def show(libc: ctypes.CDLL, path: str, target: str) -> None:
    """The same file, folder or link inside, read-only."""
    if not os.path.lexists(path) or os.path.lexists(target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT))
    mount(libc, path, target, BIND | RECURSIVE)
    kept = os.statvfs(target).f_flag & 0xE  # nosuid, nodev, noexec: what was mounted so must stay so
    mount(libc, None, target, REMOUNT | BIND | READ_ONLY | NO_SETUID | NO_DEVICE | kept)


def map_users(pid: int, root: bool) -> None:
    """Of root's namespace both root, who sets it up, and nobody, who runs the program; of anyone else's only that user."""
    for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        if kind == "gid" and not root:
            write(f"/proc/{pid}/setgroups", "deny")
        write(f"/proc/{pid}/{kind}_map", f"0 0 1\n{INSIDE} {NOBODY} 1" if root else f"{INSIDE} {own} 1")


def be_init(nothing: int, verdict: int, kept: int, seconds: int) -> None:
    """Process 1: starts the program, reaps what is left to it, and ends when the program does."""
    die_with_parent()
    program = os.fork()
    if not program:
        guarded(lambda: be_program(nothing, verdict, kept, seconds))
    while (ended := os.wait())[0] != program:
        pass
    code = os.waitstatus_to_exitcode(ended[1])
    os._exit(code if code >= 0 else 128 - code)


def be_program(nothing: int, verdict: int, kept: int, seconds: int) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    ends = (nothing, nothing, fcntl.fcntl(verdict, fcntl.F_DUPFD, 10), fcntl.fcntl(kept, fcntl.F_DUPFD, 10))
    for number, end in enumerate(ends, 1):
        os.dup2(end, number)  # all others close when the program starts
    limits = {"CORE": 0, "NOFILE": FILES, "FSIZE": FILE, "NPROC": PROCESSES, "AS": MEMORY, "CPU": seconds}
    try:
        for name, value in limits.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value + (name == "CPU")))  # the second ends it by SIGKILL
        os.execve(sys.executable, [sys.executable, "-I", "-S", "-c", RUN], {})  # capabilities stay behind: no user is root in there
    except OSError as error:
        os.write(3, json.dumps({"kind": "start", "detail": str(error)}).encode())


def guarded(do: Callable[[], object]) -> None:
    """In a child: do it and end, whatever happens."""
    try:
        do()
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(97)
    os._exit(0)


def mount(libc: ctypes.CDLL, source: str | None, target: str, flags: int, data: str | None = None, kind: str | None = None) -> None:
    source, target, kind, data = (None if text is None else text.encode() for text in (source, target, kind, data))
    checked(libc.mount(source, target, kind, ctypes.c_ulong(flags), data), f"mount on {target.decode()}")


def checked(returned: int, what: str) -> None:
    if returned:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PARENT_DEATH, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
