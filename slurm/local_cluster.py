"""A real Slurm on this machine, for tests and for trying the Slurm path on a laptop; as root or as a plain user.

    python slurm/local_cluster.py start --nodes 2 --gpus 8    then: eval "$(python slurm/local_cluster.py env)"; sinfo
    python slurm/local_cluster.py stop                        ends it, with its jobs

slurmctld, one slurmd a virtual node, and munged (with --accounting slurmdbd and mariadbd too) live in one folder, `runs/slurm` unless
--folder names another, on ports that were free at the start: clusters do not see each other. Partitions: `main`, and `high` which
preempts it (signal, 10 s, requeue). GPUs are names for /dev/null, CPUs and memory are claimed, not shared out.

Leaves out: enforcement of limits (no cgroups), containers, names for the nodes (all have the address 127.0.0.1). What it writes for
its daemons to read is in local_cluster_files.py.
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import local_cluster_files as files
from local_cluster_files import KILL_WAIT, ClusterError, Size

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
ACCOUNTING_DAEMONS = ("slurmdbd", "mariadbd")
ACCOUNTING_PACKAGES = ("slurmdbd", "mariadb-server-core")
PATIENCE = 60.0  # seconds for a daemon to answer, or to end
MARK = "LOCAL_CLUSTER_FOLDER"  # in the environment of every daemon, and of no job
NODE = "LOCAL_CLUSTER_NODE"  # in that of slurmd and its slurmstepd


@dataclass(frozen=True)
class Process:
    """A daemon, a slurmstepd or a process of a job."""

    pid: int
    program: str
    job: str | None  # None for daemons and slurmstepd
    node: str | None


@dataclass(frozen=True)
class Cluster:
    """The cluster in `folder`, running or not."""

    folder: Path

    @property
    def conf(self) -> Path:
        return self.folder / "etc" / "slurm.conf"

    @property
    def name(self) -> str:
        """Unique, as jobs carry it in SLURM_CLUSTER_NAME."""
        return f"local_{hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]}"

    def start(self, nodes: int, gpus: int, cpus: int, accounting: bool) -> str:
        """Start all daemons and wait for the nodes; returns what to tell. ClusterError, and no process left, when that fails."""
        _require(DAEMONS, PACKAGES)
        if accounting:
            _require(ACCOUNTING_DAEMONS, ACCOUNTING_PACKAGES)
        files.make_folders(self.folder)
        size = Size(nodes, gpus, cpus, accounting)
        with self._locked():
            if self._whole():
                if not self.conf.read_text().startswith(f"# {size.words}\n"):
                    raise ClusterError(f"another cluster runs in {self.folder}: stop it first, or name another with --folder")
                return f"already running in {self.folder}"
            self._end()  # of a start or a stop that was cut off
            for last in (False, True):
                try:
                    files.write(self.folder, self.name, size)
                    self._begin(size)
                    break
                except BaseException as error:
                    self._end()
                    if last or "already in use" not in str(error):  # a port, by another start at the same time
                        raise
        return f"running in {self.folder}: {nodes} nodes, {gpus} GPUs each"

    def stop(self) -> str:
        """End jobs, daemons and whatever they left; returns what to tell."""
        if not self.folder.exists():
            return f"nothing runs in {self.folder}"
        with self._locked():
            if not self.processes():
                return f"nothing runs in {self.folder}"
            self._end()
        return f"stopped in {self.folder}"

    def environment(self) -> dict[str, str]:
        """This process's, for commands of this cluster; what another Slurm or a profile says about jobs is left out."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SALLOC", "SRUN"))}
        return inherited | {"SLURM_CONF": str(self.conf)}

    def ask(self, *command: str) -> str:
        """Output of one of Slurm's commands; ClusterError when it fails."""
        try:
            done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=PATIENCE)
        except subprocess.TimeoutExpired as error:
            raise ClusterError(f"{shlex.join(command)} gave no answer within {PATIENCE:.0f} s: see {self.folder}/log") from error
        if done.returncode:
            raise ClusterError(f"{shlex.join(command)} failed: {' '.join(done.stderr.split())}")
        return done.stdout

    def require_running(self) -> None:
        if not any(process.program == "slurmctld" for process in self.processes()):
            raise ClusterError(f"no cluster runs in {self.folder}: python slurm/local_cluster.py start")

    def processes(self) -> list[Process]:
        """Everything that belongs to this cluster, by its environment: parents may have gone. A zombie has none, and does not count."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                pairs = (pair.partition("=") for pair in (entry / "environ").read_text(errors="replace").split("\0"))
                variables = {name: value for name, _, value in pairs}
                program = (entry / "comm").read_text().strip()
            except OSError:  # it has ended, or is another user's
                continue
            if variables.get(MARK) == str(self.folder):
                found.append(Process(int(entry.name), program, None, variables.get(NODE)))
            elif variables.get("SLURM_CLUSTER_NAME") == self.name:
                found.append(Process(int(entry.name), program, variables.get("SLURM_JOB_ID"), variables.get("SLURMD_NODENAME")))
        return found

    def start_node(self, node: str) -> None:
        self._launch(["slurmd", "-N", node, "-f", str(self.conf)], {NODE: node})

    def _begin(self, size: Size) -> None:
        folder = self.folder
        munge = {"key-file": "munge/key", "seed-file": "munge/seed", "socket": "run/munge.sock", "pid-file": "run/munged.pid"}
        self._launch(
            ["munged", "--force", *(f"--{option}={folder}/{path}" for option, path in munge.items()), f"--log-file={folder}/log/munged.log"]
        )
        if size.accounting:
            self._begin_accounting()
        self._launch(["slurmctld", "-i", "-f", str(self.conf)])
        names = [f"n{number}" for number in range(1, size.nodes + 1)]
        for name in names:
            self.start_node(name)
        for name in names:
            self._wait("slurmctld", lambda name=name: self._idle(name))

    def _idle(self, node: str) -> bool:
        """Whether a node is ready for jobs; False also as long as slurmctld does not answer."""
        if self._gone(lambda process: process.node == node):
            raise ClusterError(f"slurmd of {node} ended; {self._complaint(f'slurmd-{node}')}")
        with contextlib.suppress(ClusterError):
            return self.ask("sinfo", "--noheader", "--partition=main", f"--nodes={node}", "--format=%t").strip() == "idle"
        return False

    def _begin_accounting(self) -> None:
        """An empty data directory serves without mariadb-install-db, as nobody has to log in."""
        folder, store = self.folder, self.folder / "run" / "mysql.sock"
        (folder / "mysql").mkdir(mode=0o700, exist_ok=True)
        small = ["--innodb-buffer-pool-size=32M", "--innodb-log-file-size=16M", "--innodb-flush-log-at-trx-commit=0", "--skip-log-bin"]
        here = [
            f"--datadir={folder}/mysql",
            f"--socket={store}",
            f"--pid-file={folder}/run/mysqld.pid",
            f"--user={files.user()}",
        ]
        closed = ["--skip-networking", "--skip-grant-tables", "--innodb-lock-wait-timeout=900"]
        with (folder / "log" / "mariadbd.log").open("a") as log:
            command = [_program("mariadbd"), "--no-defaults", *here, *closed, *small]
            subprocess.Popen(
                command, env=self._daemon_environment({}), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._wait("mariadbd", lambda: _answers(socket.AF_UNIX, str(store)))
        self._launch(["slurmdbd"], {"MYSQL_UNIX_PORT": str(store)})
        port = int(re.search(r"DbdPort=(\d+)", (folder / "etc" / "slurmdbd.conf").read_text())[1])
        self._wait("slurmdbd", lambda: _answers(socket.AF_INET, ("127.0.0.1", port)))

    def _daemon_environment(self, more: dict[str, str]) -> dict[str, str]:
        return self.environment() | {MARK: str(self.folder)} | more

    def _launch(self, command: list[str], more: dict[str, str] | None = None) -> None:
        """Run a daemon, which leaves this process by itself."""
        words = [_program(command[0]), *command[1:]]
        log = self.folder / "log" / f"{command[0]}.err"
        with log.open("w") as errors:  # not a pipe, which the daemon could keep open
            try:
                code = subprocess.run(
                    words,
                    env=self._daemon_environment(more or {}),
                    stdin=subprocess.DEVNULL,
                    stdout=errors,
                    stderr=errors,
                    timeout=PATIENCE,
                ).returncode
            except subprocess.TimeoutExpired:
                code = 1
        if code:
            raise ClusterError(f"{command[0]} did not start: {' '.join(log.read_text().split())}")

    def _whole(self) -> bool:
        """Whether all daemons of this folder's slurm.conf run."""
        if not self.conf.exists():
            return False
        conf, running = self.conf.read_text(), self.processes()
        nodes = set(re.findall(r"^NodeName=(\S+)", conf, re.MULTILINE))
        programs = {"munged", "slurmctld", *(ACCOUNTING_DAEMONS if "/slurmdbd" in conf else ())}
        return programs <= {process.program for process in running} and nodes == {p.node for p in running if p.program == "slurmd"}

    def _wait(self, daemon: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not ready():
            gone = self._gone(lambda process: process.program == daemon)
            if gone or time.monotonic() > deadline:
                why = "ended" if gone else f"was not ready after {PATIENCE:.0f} s"
                raise ClusterError(f"{daemon} {why}; {self._complaint(daemon)}")
            time.sleep(0.05)

    def _complaint(self, daemon: str) -> str:
        """The last error in a log."""
        log = self.folder / "log" / f"{daemon}.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return f"{log}: {' '.join([line for line in lines if 'error' in line.lower() or 'fatal' in line][-1:])}"

    def _end(self) -> None:
        if any(process.program == "slurmctld" for process in self.processes()):
            for partition in ("main", "high"):
                with contextlib.suppress(ClusterError):  # it may hang; what it would have ended is killed below
                    self.ask("scancel", "--quiet", f"--partition={partition}")
            self._vanished(lambda process: process.job, KILL_WAIT + 5)
        for programs in (("slurmctld", "slurmd"), ("slurmdbd",), ("mariadbd",), ("munged",)):
            for process in self.processes():
                if process.program in programs:
                    _kill(process, signal.SIGTERM)
            self._vanished(lambda process, programs=programs: process.program in programs, 10)
        deadline = time.monotonic() + PATIENCE
        while not self._gone(lambda process: True):
            left = self.processes()
            for process in left:
                _kill(process, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise ClusterError(f"can't be killed: {', '.join(f'{process.program} ({process.pid})' for process in left)}")

    def _vanished(self, which: Callable[[Process], object], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._gone(which) and time.monotonic() < deadline:
            time.sleep(0.05)

    def _gone(self, which: Callable[[Process], object]) -> bool:
        """Whether there is no such process: one look at /proc can miss a child whose parent ends meanwhile."""
        for _ in range(2):
            if any(map(which, self.processes())):
                return False
            time.sleep(0.05)
        return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One start or stop at a time."""
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _program(name: str) -> str | None:
    """Daemons are often where only root looks."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")


def missing(programs: tuple[str, ...] = DAEMONS) -> list[str]:
    return [name for name in programs if not _program(name)]


def _require(programs: tuple[str, ...], packages: tuple[str, ...]) -> None:
    if lacking := missing(programs):
        raise ClusterError(f"{', '.join(lacking)} not found: apt-get install --no-install-recommends {' '.join(packages)}")


def _answers(family: socket.AddressFamily, address: str | tuple[str, int]) -> bool:
    with socket.socket(family) as client:
        return client.connect_ex(address) == 0


def _kill(process: Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, number)


def install() -> str:
    """Install what is missing where that is ours to do; returns what to tell. Never fails: without Slurm its tests are skipped."""
    if not missing():
        return "Slurm is installed"
    command = "apt-get install --yes --no-install-recommends"
    if os.getuid() or not shutil.which("apt-get"):
        return f"Slurm is not installed, and its tests are skipped: as root, {command} {' '.join(PACKAGES + ACCOUNTING_PACKAGES)}"
    said = ""
    for words in ("apt-get update", f"{command} {' '.join(PACKAGES)}", f"{command} {' '.join(ACCOUNTING_PACKAGES)}"):
        done = subprocess.run(words.split(), env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, capture_output=True, text=True)
        said = said or " ".join(done.stderr.split()) * bool(done.returncode)
    return f"Slurm could not be installed, and its tests are skipped: {said}" if missing() else "Slurm was installed"


def _number(least: int, most: int) -> Callable[[str], int]:
    def number(word: str) -> int:
        if not word.isdigit() or not least <= int(word) <= most:
            raise argparse.ArgumentTypeError(f"{word!r} is not a number from {least} to {most}")
        return int(word)

    return number


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["start", "stop", "status", "env", "install"])
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parents[1] / "runs" / "slurm")
    parser.add_argument("--nodes", type=_number(1, 64), default=2)
    parser.add_argument("--gpus", type=_number(0, 64), default=8, help="of each node")
    parser.add_argument("--cpus", type=_number(1, 1024), default=16, help="of each node")
    parser.add_argument("--accounting", action="store_true", help="for sacct")
    words = parser.parse_args()
    cluster = Cluster(words.folder.resolve())
    try:
        if words.command == "start":
            print(cluster.start(words.nodes, words.gpus, words.cpus, words.accounting))
        elif words.command == "stop":
            print(cluster.stop())
        elif words.command == "install":
            print(install())
        else:
            cluster.require_running()
            if words.command == "env":
                print(f"export SLURM_CONF={cluster.conf}")
            else:
                print(cluster.ask("sinfo", "--Node", "--long"), cluster.ask("squeue"), sep="\n", end="")
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename} can't be written ({error.strerror}): name another folder with --folder", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
