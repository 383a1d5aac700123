"""The private Slurm is a real one: jobs on several nodes, requeue, preemption, node failure; it starts anywhere and leaves nothing."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from slurm import local_cluster

TOOL = Path(local_cluster.__file__)
AGAIN = '[ "$SLURM_RESTART_COUNT" ] && exit 0'  # a job that is over as soon as it runs a second time


def tool(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *words]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=180)


def script(folder: Path, *lines: str) -> str:
    path = folder / "job.sh"
    path.write_text("\n".join(["#!/bin/sh", f"#SBATCH --output={folder}/%j.log --open-mode=append", *lines]) + "\n")
    return str(path)


def test_a_job_of_two_nodes_sees_its_gpus(cluster, tmp_path: Path) -> None:
    told = "srun sh -c 'echo $SLURM_PROCID $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES'"
    job = cluster.submit("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=3", script(tmp_path, told))
    cluster.wait(job)
    ranks = sorted((tmp_path / f"{job}.log").read_text().splitlines())
    nodes = cluster.ask("scontrol", "show", "hostnames", cluster.facts(job)["NodeList"]).split()
    assert ranks == [f"{rank} {nodes[rank // 2]} 0,1,2" for rank in range(4)]


def test_a_requeued_job_runs_again_and_leaves_no_process(cluster, tmp_path: Path) -> None:
    job = cluster.submit(script(tmp_path, AGAIN, "srun sleep 1000"))
    cluster.until(lambda: len(cluster.processes(job)) >= 3, "batch script, srun and sleep run")
    before = set(cluster.processes(job))
    cluster.ask("scontrol", "requeue", job)
    cluster.wait(job)
    assert cluster.facts(job)["Restarts"] == "1"
    assert not before & set(cluster.processes(job))


def test_the_high_partition_preempts_main_with_a_signal_and_a_requeue(cluster, tmp_path: Path) -> None:
    """The signal that the job asked for comes although its time limit is far, then Slurm requeues what did not end."""
    task = 'trap "echo asked" USR2; while :; do sleep 1; done'
    low = cluster.submit("--nodes=3", "--exclusive", "--signal=USR2@5", script(tmp_path, AGAIN, f"srun --ntasks=1 sh -c '{task}'"))
    cluster.wait(low, {"RUNNING"})
    cluster.until(lambda: len(cluster.processes(low)) >= 4, "the task runs")
    high = cluster.submit("--partition=high", "--nodes=3", "--output=/dev/null", "--wrap=true")
    cluster.wait(high)
    cluster.wait(low)
    assert cluster.facts(low)["Restarts"] == "1"
    assert "asked" in (tmp_path / f"{low}.log").read_text()


def test_a_job_survives_its_node(cluster, tmp_path: Path) -> None:
    job = cluster.submit(script(tmp_path, AGAIN, "srun sleep 1000"))
    cluster.until(lambda: len(cluster.processes(job)) >= 3, "batch script, srun and sleep run")
    node = cluster.facts(job)["NodeList"]
    cluster.kill_node(node)
    try:
        assert not [process for process in cluster.tool.processes() if process.node == node]  # of the job, that may run elsewhere again
        cluster.wait(job)
        assert cluster.facts(job)["NodeList"] != node
        assert cluster.facts(job)["Restarts"] == "1"
    finally:
        cluster.start_node(node)


def test_two_clusters_live_beside_each_other(cluster, another_cluster) -> None:
    with another_cluster(nodes=1, gpus=0) as other:
        names = [one.ask("srun", "--ntasks=1", "printenv", "SLURM_CLUSTER_NAME") for one in (cluster, other)]
        assert names == [cluster.tool.name, other.tool.name] and names[0] != names[1]
        ports = [set(re.findall(r"Port=(\d+)", one.tool.conf.read_text())) for one in (cluster, other)]
        assert not ports[0] & ports[1]
        job = other.submit("--output=/dev/null", "--wrap=sleep 1000")
        other.wait(job, {"RUNNING"})
        assert not cluster.ask("squeue", "--noheader", "--name=wrap")


def test_stop_leaves_nothing(another_cluster, tmp_path: Path) -> None:
    """Not even what a job hid from Slurm; and it never was in /etc/hosts."""
    hosts = Path("/etc/hosts").read_bytes()
    with another_cluster(nodes=2) as it:
        assert Path("/etc/hosts").read_bytes() == hosts
        hidden = "trap '' TERM; setsid sh -c \"trap '' TERM; sleep 1000; sleep 1000\" & srun sleep 1000; sleep 1000"
        job = it.submit("--nodes=2", "--ntasks=2", script(tmp_path, hidden))
        it.until(lambda: len(it.processes(job)) >= 7, "all of the job runs")
        pids = [process.pid for process in it.tool.processes()]
        assert len(pids) > 10
        done = tool("stop", "--folder", str(it.tool.folder))
        assert (done.returncode, done.stdout) == (0, f"stopped in {it.tool.folder}\n"), done.stderr
        assert not it.tool.processes()
        assert not [pid for pid in pids if re.search(r"^State:\s+[^Z]", status(pid), re.MULTILINE)]
        assert tool("stop", "--folder", str(it.tool.folder)).stdout == f"nothing runs in {it.tool.folder}\n"
    assert Path("/etc/hosts").read_bytes() == hosts


def status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""


def test_start_again_changes_nothing_or_mends(another_cluster, tmp_path: Path) -> None:
    with another_cluster(nodes=1, gpus=2, cpus=4) as it:
        folder = ("--folder", str(it.tool.folder))
        alive = it.tool.processes()
        assert tool("start", *folder, "--nodes=1", "--gpus=2", "--cpus=4").stdout == f"already running in {it.tool.folder}\n"
        refused = tool("start", *folder, "--nodes=2")
        assert refused.returncode == 2 and refused.stderr.startswith(f"another cluster runs in {it.tool.folder}: stop it first")
        assert it.tool.processes() == alive
        first = it.submit("--output=/dev/null", "--wrap=true")
        it.wait(first)
        assert tool("env", *folder).stdout == f"export SLURM_CONF={it.tool.conf}\n"

        killed = next(process.pid for process in alive if process.program == "slurmctld")
        os.kill(killed, signal.SIGKILL)
        it.until(lambda: all(process.pid != killed for process in it.tool.processes()), "slurmctld is gone")
        none = tool("status", *folder)
        assert none.returncode == 2 and none.stderr.startswith("no cluster runs in ")
        assert tool("start", *folder, "--nodes=1", "--gpus=2", "--cpus=4").stdout.startswith("running in ")
        assert not {process.pid for process in alive} & {process.pid for process in it.tool.processes()}
        second = it.submit("--output=/dev/null", "--wrap=true")
        it.wait(second)
        assert int(second) > int(first), "ids of jobs name log folders: they never come again"
        shown = tool("status", *folder).stdout
        assert re.search(r"^n1 .*main\*\s+idle", shown, re.MULTILINE) and "JOBID" in shown


def test_a_start_that_fails_leaves_no_process(another_cluster, tmp_path: Path) -> None:
    broken = tmp_path / "slurmctld"
    broken.write_text("#!/bin/sh\necho 'fatal: no such thing' >&2; exit 1\n")
    broken.chmod(0o755)
    with another_cluster(nodes=1) as it:
        folder = ("--folder", str(it.tool.folder))
        tool("stop", *folder)
        failed = tool("start", *folder, PATH=f"{tmp_path}:{os.environ['PATH']}")
        assert (failed.returncode, failed.stderr) == (2, "slurmctld did not start: fatal: no such thing\n")
        assert not it.tool.processes()


def test_a_plain_user_needs_no_root(tmp_path: Path) -> None:
    python = shutil.which("python3", path="/usr/bin:/bin")
    if os.getuid():
        pytest.skip("all other tests ran as a plain user")
    if lacking := [name for name in ("setpriv", *local_cluster.missing()) if not shutil.which(name)] or not python:
        pytest.skip(f"not found: {lacking}")
    with tempfile.TemporaryDirectory(prefix="slurm_") as name:  # pytest's own folders are closed to others
        home = Path(name)
        for module in TOOL.parent.glob("*.py"):
            shutil.copy(module, home)
        shutil.chown(home, "nobody")
        user = ["setpriv", "--reuid=nobody", "--regid=65534", "--clear-groups"]

        def run(*words: str) -> str:
            done = subprocess.run([*user, *words], env=environment, cwd=home, capture_output=True, text=True, timeout=180)
            assert done.returncode == 0, done.stderr
            return done.stdout

        folder = home / "cluster"
        environment = {"PATH": "/usr/bin:/bin", "SLURM_CONF": f"{folder}/etc/slurm.conf"}
        try:
            run(python, TOOL.name, "start", "--folder", str(folder))
            told = run("srun", "--nodes=2", "sh", "-c", "echo $(id -un) $SLURMD_NODENAME")
            assert sorted(told.splitlines()) == ["nobody n1", "nobody n2"]
        finally:
            run(python, TOOL.name, "stop", "--folder", str(folder))
        assert not local_cluster.Cluster(folder).processes()


def test_sacct_tells_of_a_job_with_accounting(another_cluster) -> None:
    if lacking := local_cluster.missing(local_cluster.ACCOUNTING_DAEMONS):
        pytest.skip(f"{', '.join(lacking)} not found: apt-get install {' '.join(local_cluster.ACCOUNTING_PACKAGES)}")
    with another_cluster(nodes=1, accounting=True) as it:
        job = it.submit("--output=/dev/null", "--gpus=2", "--wrap=srun true")
        it.wait(job)
        asked = ("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}", "--format=State,AllocTRES")
        it.until(lambda: it.ask(*asked).startswith("COMPLETED|"), "sacct shows the job")
        assert "gres/gpu=2" in it.ask(*asked)


def test_what_is_missing_is_said_with_the_mend(tmp_path: Path) -> None:
    done = tool("start", "--folder", str(tmp_path), PATH=str(tmp_path))
    assert done.returncode == 2
    assert re.fullmatch(r".*sbatch not found: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge\n", done.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("folder", "nodes", "said"),
    [
        ("a folder", "2", "/a folder': name one of letters and digits with --folder"),
        ("long" * 30, "2", "is too long for a Unix socket"),
        ("/proc/cluster", "2", "/proc/cluster can't be written"),
        ("short", "0", "'0' is not a number from 1 to 64"),
    ],
)
def test_bad_words_are_refused_before_anything_is_written(tmp_path: Path, folder: str, nodes: str, said: str) -> None:
    if lacking := local_cluster.missing():
        pytest.skip(f"not found: {', '.join(lacking)}")
    done = tool("start", "--folder", str(tmp_path / folder), "--nodes", nodes)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert not (tmp_path / folder).exists()


@pytest.mark.parametrize("code", [0, 1])
def test_install_says_why_it_could_not(tmp_path: Path, code: int) -> None:
    """One line and exit code 0, so that `make test` goes on; only root is offered to change the machine."""
    packager, called = tmp_path / "apt-get", tmp_path / "called"
    packager.write_text(f'#!/bin/sh\necho "$*" >> {called}; echo "no way" >&2; exit {code}\n')
    packager.chmod(0o755)
    done = tool("install", PATH=str(tmp_path))
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1 and "its tests are skipped: " in done.stdout
    if os.getuid():
        assert not called.exists()
    else:
        assert ("no way" in done.stdout) == bool(code)
        assert "install --yes --no-install-recommends slurmctld slurmd slurm-client munge" in called.read_text()


def test_waiting_for_a_job_that_failed_ends_with_its_output(cluster, tmp_path: Path) -> None:
    job = cluster.submit(script(tmp_path, "echo so it went; exit 3"))
    with pytest.raises(pytest.fail.Exception, match=r"(?s)is FAILED \(NonZeroExitCode\), not COMPLETED.*so it went.*slurmctld"):
        cluster.wait(job)
