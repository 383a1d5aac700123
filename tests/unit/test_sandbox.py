"""Programs that nobody should run: what each is judged to be, what it could not reach, and that nothing of it is left."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from evaluation import jail, sandbox
from evaluation.sandbox import Outcome, Program, run
from megatron_tower.config import InputError

TEST = "def check(f):\n    assert f(1) == 2, 'not two'\n    assert f(2) == 3\n"
RIGHT = "def f(x): return x + 1\n"
SECRET = "hunter2"

# fmt: off
CASES = {  # program, what it is judged to be, what must stand in the detail
    "right": (RIGHT, "passed", ""),
    "right, and a thread that never ends": (f"import threading, time\nthreading.Thread(target=time.sleep, args=[9999]).start()\n{RIGHT}",
                                            "passed", ""),
    "wrong": ("def f(x): return x", "wrong", "not two"),
    "raises": ("def f(x): return 1 / 0", "error", "ZeroDivisionError"),
    "no such function": ("def g(x): return x + 1", "error", "KeyError"),
    "reads stdin": ("def f(x): return input()", "error", "EOFError"),
    "not Python": ("def f(x) return x", "unparsable", ""),
    "not a text": ("def f(x): return '\0\ud800'", "unparsable", ""),
    "leaves by os._exit": ("import os\ndef f(x): os._exit(0)", "error", "exit code 0 before"),
    "leaves by sys.exit": ("import sys\nsys.exit(0)", "error", "SystemExit"),
    "is killed": ("import os\ndef f(x): os.kill(os.getpid(), 9)", "error", "signal 9"),
    "crashes": ("import ctypes\ndef f(x): ctypes.string_at(0)", "error", "signal 11"),
    "says that it passed": ('import os\ndef f(x):\n os.write(3, b\'{"kind": "passed", "detail": ""}\')\n os._exit(0)', "error", ""),
    "closes everything": ("import os\nos.closerange(0, 64)\ndef f(x): return x", "error", "before its tests did"),
    "patches builtins": ("import builtins\nbuiltins.compile = builtins.exec = builtins.print = None\nbuiltins.AssertionError = KeyError\n"
                         "builtins.BaseException = ZeroDivisionError\ndef f(x): return x", "error", ""),
    "patches what judges": ("import os, json\nos.read = os._exit = json.dumps = json.load = lambda *a: 'passed'\ndef f(x): return x",
                            "error", ""),
    "memory": ("def f(x): return len(bytearray(4 << 30))", "memory", ""),
    "memory, bit by bit": ("def f(x):\n held = []\n while True: held.append(bytearray(1 << 24))", "memory", ""),
    "prints gigabytes": (f"import os\nfor _ in range(4096): os.write(1, b'x' * (1 << 20)), os.write(2, b'x' * (1 << 20))\n{RIGHT}",
                         "passed", ""),
    "a large file": ("def f(x): open('here', 'wb').write(b'x' * (1 << 23))", "error", "File too large"),
    "many files": ("def f(x):\n for n in range(32): open(f'here{n}', 'wb').write(b'x' * (1 << 20))", "error", "No space left"),
    "many open files": ("def f(x): return [open('here', 'w') for _ in range(999)]", "error", "Too many open files"),
    "forks": ("import os, time\ndef f(x):\n for n in range(99):\n  if not os.fork(): time.sleep(9999)", "error", "BlockingIOError"),
    "fork bomb": ("import os\ndef f(x):\n while True: os.fork()", "error", "BlockingIOError"),
    "writes here": (f"open('here', 'w').write('x')\n{RIGHT}", "passed", ""),
    "reads the environment": ("import os\ndef f(x): raise ValueError(sorted(os.environ))", "error", "['LC_CTYPE']"),  # Python's own
    "names of all it sees": ("import os\ndef f(x): raise ValueError(sorted(os.listdir('/')), os.listdir('.'), os.getpid())", "error", ""),
    "other processes": ("import os\ndef f(x): os.kill(PARENT, 9)", "error", "ProcessLookupError"),
    "capabilities": ("import os\ndef f(x): os.setuid(0)", "error", "PermissionError"),
    "mounts": ("import ctypes\ndef f(x):\n libc = ctypes.CDLL(None, use_errno=True)\n"
               " raise ValueError(libc.mount(None, b'/usr', None, 32 | 4096, None), ctypes.get_errno())", "error", "(-1, 1)"),
    "network": ("import socket\ndef f(x): socket.create_connection(('127.0.0.1', PORT), 5)", "error", "Network is unreachable"),
    "writes out": ("def f(x): open('FOLDER/mark', 'w').write('x')", "error", "FileNotFoundError"),
    "writes into the interpreter": ("import os\ndef f(x): open(os.path.dirname(os.__file__) + '/mark', 'w')", "error",
                                    "Read-only file system"),
    "reads a file": ("def f(x): raise ValueError(open('FOLDER/secret').read())", "error", "FileNotFoundError"),
    "leaves the folder": ("import os\ndef f(x): os.chroot('.')", "error", "PermissionError"),
}
# fmt: on


@pytest.fixture(scope="module")
def allowed() -> None:
    try:
        sandbox.require()
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def outcomes(allowed: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """All cases, run beside one another, with what they try to reach within reach of this process."""
    folder = tmp_path_factory.mktemp("near")
    (folder / "secret").write_text(SECRET)
    folder.chmod(0o777)
    library = Path(os.__file__).with_name("mark")
    os.environ["SANDBOX_TEST_KEY"] = SECRET
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = {"FOLDER": str(folder), "PORT": str(server.getsockname()[1]), "PARENT": str(os.getpid())}
        programs = []
        for source, _, _ in CASES.values():
            for name, value in near.items():
                source = source.replace(name, value)
            programs.append(Program((source,), TEST, "f"))
        found = sandbox.run_all(programs)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    del os.environ["SANDBOX_TEST_KEY"]
    assert [path.name for path in folder.iterdir()] == ["secret"] and not library.exists()
    assert SECRET not in str(found)
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_what_each_program_is_judged_to_be(outcomes: dict[str, Outcome], name: str) -> None:
    _, kind, detail = CASES[name]
    assert outcomes[name].kind == kind and detail in outcomes[name].detail, outcomes[name]


def test_a_program_sees_the_interpreter_and_an_empty_folder(outcomes: dict[str, Outcome]) -> None:
    top = {"work"} | {Path(path).parts[1] for path in (*jail.SEEN, sys.base_prefix) if os.path.lexists(path)}
    assert outcomes["names of all it sees"].detail == f"ValueError: ({sorted(top)}, [], 2)"


def test_the_first_candidate_that_compiles_is_the_program(allowed: None) -> None:
    assert run(Program(("def f(x):", RIGHT, "def f(x): return x"), TEST, "f")) == Outcome("passed")


@pytest.mark.parametrize("does", ["while True: pass", "import time; time.sleep(9999)"])
def test_a_program_that_does_not_end_is_a_time_out(allowed: None, does: str) -> None:
    assert run(Program((does,), TEST, "f"), seconds=1) == Outcome("timeout")


def marked(mark: str) -> list[psutil.Process]:
    return [process for process in psutil.process_iter(["cmdline"]) if mark in (process.info["cmdline"] or [])]


def detached(mark: str, then: str) -> Program:
    """Leaves a grandchild in a session of its own, that holds nothing open, and goes on when it is there."""
    source = f"""
        import os, signal, sys, time
        ready, go = os.pipe()
        os.set_inheritable(go, True)
        if not os.fork():
            os.setsid()
            if not os.fork():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                for number in (0, 1, 2, 3, 4): os.close(number)
                code = f"import os, time; os.write({{go}}, b'x'); os.close({{go}}); time.sleep(9999)"
                os.execv(sys.executable, [sys.executable, "-c", code, "{mark}"])
            os._exit(0)
        os.close(go)
        assert os.read(ready, 1)
        def f(x):
            {then}
    """
    return Program((textwrap.dedent(source),), TEST, "f")


@pytest.mark.parametrize(("then", "kind"), [("return x + 1", "passed"), ("return x", "wrong"), ("while True: pass", "timeout")])
def test_no_grandchild_is_left(allowed: None, then: str, kind: str) -> None:
    mark = f"mark-{time.time_ns()}"
    assert run(detached(mark, then), seconds=1).kind == kind
    assert not marked(mark)


def test_programs_die_with_an_evaluation_that_is_killed(allowed: None) -> None:
    mark = f"mark-{time.time_ns()}"
    source = f"from evaluation.sandbox import Program, run; run({detached(mark, 'time.sleep(9999)')!r}, 600)"
    evaluation = subprocess.Popen([sys.executable, "-c", source])
    while not (found := marked(mark)):
        assert evaluation.poll() is None
        time.sleep(0.01)
    os.kill(evaluation.pid, signal.SIGKILL)
    evaluation.wait()
    _, alive = psutil.wait_procs(found, timeout=10)
    assert not alive


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        (lambda path: path.write_text("raise PermissionError(1, 'unshare: Operation not permitted')"), "unshare: Operation not permitted"),
        (lambda path: path.write_text('print(\'{"kind": "error", "detail": "no libpython"}\')'), "error no libpython"),
        (lambda path: None, "No such file or directory"),
    ],
)
def test_a_machine_without_such_a_place_is_told_so(
    does: Callable[[Path], object], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "JAIL", tmp_path / "jail.py")
    does(tmp_path / "jail.py")
    with pytest.raises(InputError, match=rf"this machine gives none \(.*{reason}.*\): allow them"):
        sandbox.require()
