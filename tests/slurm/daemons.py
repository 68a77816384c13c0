"""A real Slurm of this machine alone, for as long as a context lasts: munged, slurmctld and slurmd on loopback.

It needs root, for slurmd starts jobs as their users, and Debian's packages slurmctld, slurmd, slurm-client and
munge.
Partition `main` preempts `low`. The node has more cores than the machine, and one GPU, in name only.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODE, CPUS, MAX_ARRAY_SIZE = "localhost", 12, 4
GRACE_SECONDS = 30
START_SECONDS = 30.0

CONFIG = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={control}
SlurmdPort={node}
SlurmUser=root
AuthType=auth/munge
# A job that is requeued may start again after this time, and no sooner.
AuthInfo=cred_expire=5,socket={folder}/munge/socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PriorityType=priority/basic
SwitchType=switch/none
JobRequeue=1
ReturnToService=2
MinJobAge=3600
KillWait=10
MaxArraySize={max_array_size}
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={name} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=64000 Gres=gpu:1 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes={name} Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes={name} MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
"""


def missing() -> str:
    """Say why no Slurm can be started here; empty if one can."""
    if os.geteuid() != 0:
        return "slurmd needs root"
    lacks = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    return f"no {', '.join(lacks)}: install slurmctld, slurmd, slurm-client and munge" if lacks else ""


@contextmanager
def running(folder: Path) -> Iterator[dict[str, str]]:
    """Start a Slurm whose state and logs lie in a folder, and stop it with all of its jobs.

    Args:
        folder: empty, and one that any user may enter: munged is not root.

    Yields:
        What must be in the environment of sbatch and others.

    Raises:
        RuntimeError: it does not come up; the end of its logs is said.
    """
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
    _write_files(folder)
    daemons: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        with (folder / f"{Path(command[0]).name}.out").open("wb") as out:
            daemons.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))

    try:
        munge = folder / "munge"
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={munge / name}" for option, name in files.items()]
        start("runuser", "-u", "munge", "--", "munged", "--foreground", "--force", *options)
        _wait(lambda: (munge / "socket").exists(), "munged", folder)
        start("slurmctld", "-D", "-c")
        start("slurmd", "-D", "-N", NODE)
        _wait(lambda: _ask(environment, "sinfo", "-h", "-p", "main", "-o", "%T") == "idle", "the node", folder)
        yield environment
    finally:
        if len(daemons) == 3:
            _end_jobs(environment)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _write_files(folder: Path) -> None:
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(parents=True)
    (folder / "gpu").touch()  # slurmd counts device files, any will do
    (folder / "gres.conf").write_text(f"AutoDetect=off\nNodeName={NODE} Name=gpu File={folder}/gpu\n")
    control, node = _free_ports(2)
    values = {"control": control, "node": node, "name": NODE, "cpus": CPUS, "grace": GRACE_SECONDS}
    text = CONFIG.format(folder=folder, max_array_size=MAX_ARRAY_SIZE, **values)
    (folder / "slurm.conf").write_text(text)
    munge, user = folder / "munge", pwd.getpwnam("munge")
    (munge / "key").write_bytes(os.urandom(1024))
    for path in (munge, munge / "key"):
        os.chown(path, user.pw_uid, user.pw_gid)
    munge.chmod(0o711)
    (munge / "key").chmod(0o400)


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _ask(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=20)
    return done.stdout.strip()


def _wait(event: Callable[[], bool], what: str, folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not event():
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.[lo]*"))
            raise RuntimeError(f"{what} did not come up in {START_SECONDS:g} s\n{logs}")
        time.sleep(0.1)


def _end_jobs(environment: dict[str, str]) -> None:
    _ask(environment, "scancel", "--user=root")
    _ask(environment, "scancel", "--signal=KILL", "--full", "--user=root")
    deadline = time.monotonic() + 15
    while _ask(environment, "squeue", "-h", "-t", "R,CG") and time.monotonic() < deadline:
        time.sleep(0.3)
