"""A real Slurm on this machine alone: munged, slurmctld and some slurmd, on loopback.

Needs root and, on Debian, `slurmctld slurmd slurm-client munge`. Ports are free ones, so several
may run beside each other; everything lies in one folder and is stopped by its own pid files.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
_PATIENCE_S = 120.0
# What mattered: cred_expire, or a requeued job waits two minutes; KillWait; no accounting; and
# NoAddrAny, so that nothing listens but on loopback.
_SETTINGS = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_interval=2,bf_interval=2
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=3600
MailProg=/bin/true
DefMemPerCPU=500
JobRequeue=1
GresTypes=gpu
"""
_PARTITIONS = """\
PartitionName=low Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str:
    """Why no Slurm can be started here; empty if one can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"no {missing[0]}: apt-get install slurmctld slurmd slurm-client munge"
    return "" if os.geteuid() == 0 else "only root can start a Slurm"


@dataclass(frozen=True)
class Slurm:
    """A running one.

    Attributes:
        base: its folder; logs are in it.
        conf: what SLURM_CONF must be.
    """

    base: Path
    conf: Path

    def environment(self) -> dict[str, str]:
        """Of commands that talk to it."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        return {**inherited, "SLURM_CONF": str(self.conf)}

    def call(self, *command: str, cwd: Path | None = None) -> str:
        """Runs a command of Slurm; returns what it printed."""
        done = subprocess.run(
            command, env=self.environment(), cwd=cwd, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def start_node(self, name: str) -> None:
        """Starts a node's slurmd, for the first time or after it was lost."""
        self.call("slurmd", "-N", name, "-f", str(self.conf))

    def lose_node(self, name: str) -> None:
        """Kills a node's slurmd; what runs on the node lives on."""
        file = self.base / f"slurmd.{name}.pid"
        os.kill(int(file.read_text()), signal.SIGKILL)
        file.unlink()

    def submit(self, script: Path, *options: str) -> str:
        """Returns the job's id."""
        return self.call("sbatch", "--parsable", *options, str(script), cwd=script.parent)

    def states(self, job: str) -> dict[str, str]:
        """Job, or element of an array as `<array>_<task>` -> its state."""
        found = {}
        for fields in self._fields(job):
            name = fields["JobId"]
            if "ArrayTaskId" in fields:
                name = f"{fields['ArrayJobId']}_{fields['ArrayTaskId']}"
            found[name] = fields["JobState"]
        return found

    def _fields(self, job: str) -> list[dict[str, str]]:
        """What is known of a job, or of each element of an array."""
        lines = self.call("scontrol", "--oneliner", "show", "job", job).splitlines()
        return [dict(f.split("=", 1) for f in line.split() if "=" in f) for line in lines]

    def times(self, job: str) -> tuple[str, str]:
        """When a job, or the first and the last element of an array, began and ended, as Slurm
        writes it."""
        fields = self._fields(job)
        return min(f["StartTime"] for f in fields), max(f["EndTime"] for f in fields)

    def node_of(self, job: str) -> str:
        """Where a job of one node runs, or ran at last."""
        return self._fields(job)[0]["NodeList"]

    def wait(self, job: str, *, until: Sequence[str] = ("COMPLETED", "FAILED")) -> dict[str, str]:
        """Waits until a job, or each element of an array, is in one of these states."""
        wait_until(lambda: set(self.states(job).values()) <= set(until))
        return self.states(job)


def wait_until(condition: Callable[[], bool], patience_s: float = _PATIENCE_S) -> None:
    """Looks ten times a second."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.1)


@contextmanager
def slurm_cluster(
    num_nodes: int = 2, *, cpus: int = 2, memory_mb: int = 4000, lost_after_s: int = 30
) -> Iterator[Slurm]:
    """Starts one, waits until its nodes are idle, and stops it at the end of the block.

    `lost_after_s`: a node whose slurmd does not answer so long is down."""
    base = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: it holds sockets
    slurm = Slurm(base, base / "slurm.conf")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, base, ignore_errors=True)
        for name in ("state", "log", "munge"):
            (base / name).mkdir()
        base.chmod(0o755)
        (base / "munge").chmod(0o711)
        key = base / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        _configure(slurm, num_nodes, cpus, memory_mb, lost_after_s)
        stack.callback(_stop, slurm)
        munge = base / "munge"
        slurm.call(
            "munged", "--force", f"--key-file={key}", f"--socket={munge / 'sock'}",
            "--num-threads=2", f"--pid-file={munge / 'pid'}", f"--log-file={munge / 'log'}",
            f"--seed-file={munge / 'seed'}",
        )  # fmt: skip
        slurm.call("slurmctld", "-c", "-f", str(slurm.conf))
        for number in range(num_nodes):
            slurm.start_node(f"n{number}")
        wait_until(lambda: _idle(slurm) == num_nodes)
        yield slurm


def _configure(slurm: Slurm, num_nodes: int, cpus: int, memory_mb: int, lost_after_s: int) -> None:
    base = slurm.base
    control, *ports = _free_ports(1 + num_nodes)
    nodes = [
        f"NodeName=n{number} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={cpus} "
        f"RealMemory={memory_mb} Gres=gpu:2 State=UNKNOWN"
        for number, port in enumerate(ports)
    ]
    here = f"""\
SlurmctldPort={control}
SlurmdTimeout={lost_after_s}
AuthInfo=socket={base}/munge/sock,cred_expire=5
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool.%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd.%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd.%n.log
"""
    slurm.conf.write_text(_SETTINGS + here + "\n".join(nodes) + "\n" + _PARTITIONS)
    for number in range(num_nodes):
        (base / f"spool.n{number}").mkdir()
    gpus = [f"NodeName=n[0-{num_nodes - 1}] Name=gpu File=/dev/{d}" for d in ("null", "zero")]
    (base / "gres.conf").write_text("\n".join(gpus) + "\n")


def _idle(slurm: Slurm) -> int:
    told = slurm.call("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D")
    return sum(int(line) for line in told.split())


def _stop(slurm: Slurm) -> None:
    with suppress(AssertionError):
        slurm.call("scancel", "--quiet", "--full", "--state=RUNNING", "--user=root")
        slurm.call("scancel", "--quiet", "--user=root")
        time.sleep(0.5)
    for file in (*slurm.base.glob("*.pid"), slurm.base / "munge" / "pid"):
        with suppress(OSError, ValueError):
            os.kill(int(file.read_text()), signal.SIGTERM)


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in found]
