"""What lies in the folder of a private Slurm before its daemons start (`local_cluster.py`): settings, a key, devices, free ports.

    etc/      slurm.conf, slurmdbd.conf and gres.conf, written anew at each start, with the ports that are free then
    dev/      the GPUs: names for /dev/null
    munge/    a key, made once
    state/    Slurm's own; job ids go on from the last start, and what it says of nodes is removed

Leaves out: the daemons, and all that they write.  Run:  python slurm/local_cluster.py start
"""

import contextlib
import os
import pwd
import random
import re
import socket
from dataclasses import dataclass
from pathlib import Path

PORTS = range(30_000, 32_700)  # above those of jobs (runtime/ports.py), below those that Linux gives to outgoing connections
LONGEST = 107 - len("/spool/n64/n64_999999.4294967291")  # of the folder's path: Slurm keeps a Unix socket of this name, Linux allows 107
KILL_WAIT = 5  # seconds between SIGTERM and SIGKILL

SLURM_CONF = """\
# {size.words}
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
PropagateResourceLimits=NONE
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
# ended jobs stay visible without accounting
MinJobAge=86400
KillWait={kill_wait}
CompleteWait=0
InactiveLimit=0
# this machine may be busy with everything else
MessageTimeout=30
BatchStartTimeout=60
SlurmctldTimeout=60
SlurmdTimeout=60
ReturnToService=2
{accounting}
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=1-0 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=high Nodes=ALL MaxTime=1-0 State=UP PriorityTier=10 PreemptMode=OFF
"""

ACCOUNTING = """\
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={port}
AccountingStoragePass={folder}/run/munge.sock
AccountingStorageTRES=gres/gpu
"""

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock
DbdHost=localhost
DbdPort={port}
SlurmUser={user}
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
"""


class ClusterError(Exception):
    """What stands in the way, in one sentence."""


@dataclass(frozen=True)
class Size:
    """What a cluster claims to have. gpus, cpus: of each node."""

    nodes: int
    gpus: int
    cpus: int
    accounting: bool

    @property
    def words(self) -> str:
        """By which slurm.conf says what it was written for."""
        return f"nodes={self.nodes} gpus={self.gpus} cpus={self.cpus} accounting={self.accounting}"


def make_folders(folder: Path) -> None:
    """Raises ClusterError for a folder that Slurm can't use."""
    if not re.fullmatch(r"[\w./+@~-]+", str(folder), re.ASCII):
        raise ClusterError(f"Slurm can't use the folder {str(folder)!r}: name one of letters and digits with --folder")
    if len(str(folder)) > LONGEST:
        raise ClusterError(f"the path {folder} is too long for a Unix socket: name one of up to {LONGEST} characters with --folder")
    for name in ("etc", "run", "log", "state", "spool", "munge", "dev"):
        (folder / name).mkdir(parents=True, exist_ok=True)


def write(folder: Path, name: str, size: Size) -> None:
    """All files for the cluster of this name, in folders that are there; ClusterError when no ports are free, or the user has no name."""
    ports, owner = _free_ports(size.nodes + 2), user()
    conf, dbd = folder / "etc" / "slurm.conf", folder / "etc" / "slurmdbd.conf"
    told = {"size": size, "name": name, "host": _host(), "user": owner, "folder": folder, "kill_wait": KILL_WAIT}
    stored = ACCOUNTING.format(port=ports[1], folder=folder) if size.accounting else "AccountingStorageType=accounting_storage/none"
    conf.write_text(SLURM_CONF.format(**told, port=ports[0], accounting=stored, nodes="\n".join(_nodes(size, ports[2:]))))
    dbd.touch(mode=0o600)
    dbd.write_text(SLURMDBD_CONF.format(folder=folder, port=ports[1], user=owner))
    for gpu in range(size.gpus):  # Slurm wants character devices
        device = folder / "dev" / f"nvidia{gpu}"
        device.unlink(missing_ok=True)
        device.symlink_to("/dev/null")
    (folder / "etc" / "gres.conf").write_text(f"Name=gpu File={folder}/dev/nvidia[0-{size.gpus - 1}]\n" if size.gpus else "")
    for number in range(1, size.nodes + 1):
        (folder / "spool" / f"n{number}").mkdir(exist_ok=True)
    (folder / "munge").chmod(0o700)
    key = folder / "munge" / "key"
    if not key.exists() or key.stat().st_size < 64:
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
    # job ids go on from the last start; nodes are new, and the folder may have been moved
    for old in ("node_state", "node_state.old", "clustername"):
        (folder / "state" / old).unlink(missing_ok=True)


def _nodes(size: Size, ports: list[int]) -> list[str]:
    """A line of slurm.conf for each."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20
    facts = f"CPUs={size.cpus} Sockets=1 CoresPerSocket={size.cpus} ThreadsPerCore=1 RealMemory={memory}"
    facts += f" Gres=gpu:{size.gpus}" if size.gpus else ""
    return [
        f"NodeName=n{number} NodeHostname={_host()} NodeAddr=127.0.0.1 Port={port} {facts} State=UNKNOWN"
        for number, port in enumerate(ports, start=1)
    ]


def _host() -> str:
    return socket.gethostname().partition(".")[0]


def user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError as error:
        raise ClusterError(f"Slurm needs a user with a name, and user id {os.getuid()} has none: add it to /etc/passwd") from error


def _free_ports(count: int) -> list[int]:
    """Free on all addresses; from a random one on, so that two starts at once seldom meet."""
    first, ports = random.randrange(len(PORTS)), []
    for shift in range(len(PORTS)):
        port = PORTS[(first + shift) % len(PORTS)]
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise ClusterError(f"fewer than {count} ports from {PORTS.start} to {PORTS.stop} are free on this machine")
