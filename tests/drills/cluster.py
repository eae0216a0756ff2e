"""Drills on a Ray cluster of several hosts: nodes and links that fail, and some that come back.

Host 0 runs Ray's head and the driver, but no rank. Of the three others one is spare, as each has
room for one of two ranks. Each host has one core, so that every rank computes with one thread.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from moetrain.settings import Config
from moetrain.settings.validation import validated
from moetrain.verify.comparison import difference, norm
from moetrain.verify.tolerance import tolerances
from tests.drills.drill import (
    KILL_NOTICE,
    KILL_TARGET,
    NODE_DETECTION,
    NODE_TARGET,
    TIMEOUT_SECONDS,
    Result,
    Run,
    Site,
    alive,
    is_as_if_undisturbed,
    time_of,
)
from tests.drills.faults import on, variables
from tests.drills.hosts import Cluster, Hosts
from tests.drills.single_host import check_report, driver_killed, ended_well, replaced, slug
from tests.support.runs import write_shards
from tests.torture.content import read_plainly

LEASE_SECONDS, HANG_SECONDS = 12, 20
PLACES = (0, 1, 1, 1)
METADATA_PORT = 8111


@dataclass(frozen=True, kw_only=True)
class ClusterSite(Site):
    """Where commands run: on host 0."""

    cluster: Cluster

    def host_of(self, run: Run, rank: int) -> int:
        """Returns the host that a rank of the newest attempt runs on."""
        address = next(r["node"] for r in run.ranks() if r["rank"] == rank)
        return next(n for n in range(len(PLACES)) if self.hosts.address(n) == address)

    @property
    def hosts(self) -> Hosts:
        """The hosts of the cluster."""
        return self.cluster.hosts


@contextlib.contextmanager
def four_hosts(folder: Path) -> Iterator[ClusterSite]:
    """Returns a site on a cluster that lasts as long as the context."""
    root = str(Path(__file__).parents[2])
    environment = os.environ | variables(folder, python_path=root)
    environment["GCE_METADATA_HOST"] = f"127.0.0.1:{METADATA_PORT}"
    with (
        Hosts(len(PLACES)) as hosts,
        Cluster(
            hosts, places=PLACES, environment=environment, log=folder / "cluster.log"
        ) as cluster,
    ):
        yield ClusterSite(
            folder=folder,
            shards=write_shards(folder),
            environment=cluster.environment,
            prefix=hosts.command(0, []),
            overrides=[
                f"launch.address={cluster.address}", "launch.num_workers=2",
                f"launch.hang_timeout_seconds={HANG_SECONDS}",
                f"launch.lease_seconds={LEASE_SECONDS}",
            ],
            cluster=cluster,
        )  # fmt: skip


# Steps long enough for a host to come back, or a preemption notice to be given, during the run. In
# another layout sums are rounded in another order: all experts are chosen, so that no rounding
# makes a token choose another one, and SGD doesn't amplify it.
LONG = [
    "launch.elastic=true", "optim=sgd", "optim.lr=0.1", "model.top_k=4", "train.dtype=float32",
    "checkpoint.keep_every=10", "train.num_steps=240", "train.global_batch_size=32",
    "train.seq_len=128", "model.max_seq_len=128",
]  # fmt: skip


def inject_into_host(
    site: ClusterSite,
    name: str,
    inject: Callable[[Run, int], None],
    *overrides: str,
    rank: int,
    failures: set[str],
    meanwhile: Callable[[Run, int, Result, float], None] = lambda *_: None,
) -> Result:
    """Injects a fault into the host of a rank, and compares the result with an undisturbed run.

    `failures` are the kinds as which it may be reported. `meanwhile` is called once the next
    attempt has done a step, with the host, the result and the time of the fault.
    """
    whole = site.undisturbed()
    result = Result(drill=name, detection_target=NODE_DETECTION, target=NODE_TARGET)
    site.cluster.repair()
    run = Run(site, slug(name), *overrides)
    with run.started() as process:
        run.wait_for_step(25)
        host = site.host_of(run, rank)
        at = time.time()
        inject(run, host)
        result.next_step = run.next_step_after(at)
        meanwhile(run, host, result, at)
        process.wait(timeout=TIMEOUT_SECONDS)
    ended_well(run, process, result)
    check_report(run, result, at, failures=failures, said=site.hosts.address(host))
    is_as_if_undisturbed(run, whole, result)
    return result


def power_gone(site: ClusterSite) -> Result:
    """A host vanishes without closing any connection."""

    def inject(run: Run, host: int) -> None:
        site.hosts.cut(host)
        site.hosts.kill(host)

    return inject_into_host(
        site, "node's power gone, spare takes over", inject, rank=0, failures={"lost", "died"}
    )


def node_killed(site: ClusterSite) -> Result:
    """All processes of a host end, and its kernel closes their connections."""
    return inject_into_host(
        site, "node's processes killed, spare takes over", lambda _, host: site.hosts.kill(host),
        rank=1, failures={"lost", "died"},
    )  # fmt: skip


def cut_and_healed(site: ClusterSite) -> Result:
    """A link is down until its host is given up, and is restored while others train."""

    def meanwhile(run: Run, host: int, result: Result, at: float) -> None:
        site.hosts.heal(host)

    return inject_into_host(
        site, "network cut, healed once the spare trains", lambda _, host: site.hosts.cut(host),
        rank=1, failures={"lost", "died"}, meanwhile=meanwhile,
    )  # fmt: skip


def cut_for_good(site: ClusterSite) -> Result:
    """A link is down permanently; the rank behind it ends itself once its lease has expired."""

    def meanwhile(run: Run, host: int, result: Result, at: float) -> None:
        address = site.hosts.address(host)
        ranks = run.events("attempt")[0]["ranks"]
        (pid,) = [rank["pid"] for rank in ranks if rank["node"] == address]
        most = LEASE_SECONDS * 1.5
        while alive(pid) and time.time() < at + most:
            time.sleep(0.1)
        if alive(pid):
            result.problems.append(f"the rank cut off is still there after {most:.0f} s")

    return inject_into_host(
        site, "network cut for good, spare takes over", lambda _, host: site.hosts.cut(host),
        rank=0, failures={"lost", "died"}, meanwhile=meanwhile,
    )  # fmt: skip


def short_cut(site: ClusterSite, *, seconds: float = 3.0) -> Result:
    """A link is down for a moment; whatever the supervisor decides, the run continues."""
    result = Result(drill=f"network cut for {seconds:.0f} s", target=NODE_TARGET)
    whole = site.undisturbed()
    site.cluster.repair()
    run = Run(site, slug(result.drill))
    with run.started() as process:
        run.wait_for_step(25)
        host, at = site.host_of(run, 1), time.time()
        site.hosts.cut(host)
        time.sleep(seconds / 2)
        stalled = run.step()
        time.sleep(seconds / 2)
        if run.step() > stalled:
            result.problems.append("the cut didn't stop the run")
        site.hosts.heal(host)
        run.wait_for_step(stalled + 2)
        result.next_step = time.time() - at
        process.wait(timeout=TIMEOUT_SECONDS)
    result.said = "; ".join(e["reason"] for e in run.events("failure")) or "nothing: it waited"
    ended_well(run, process, result)
    is_as_if_undisturbed(run, whole, result)
    return result


def head_killed(site: ClusterSite) -> Result:
    """Ray's head and the driver are killed; the cluster is restarted, and then the command."""
    whole = site.undisturbed()
    result = Result(drill="head node killed, job resubmitted", target=NODE_TARGET)
    site.cluster.repair()
    run = Run(site, slug(result.drill))
    with run.started() as process:
        run.wait_for_step(25)
        at = time.time()
        site.hosts.kill(0)
        process.wait()
    result.detected = time.time() - at
    site.cluster.repair()
    with run.started() as process:
        result.next_step = run.next_step_after(at)
        process.wait(timeout=TIMEOUT_SECONDS)
    result.said = "the same command again, on a new head"
    ended_well(run, process, result)
    is_as_if_undisturbed(run, whole, result)
    return result


def drained(site: ClusterSite) -> Result:
    """Ray drains a node."""
    return announced(
        site, "drain notice, run moves to the spare", lambda _, n: site.cluster.drain(n)
    )


def warned(site: ClusterSite) -> Result:
    """A cloud's metadata service reports, on one node only, that it will be preempted."""
    with clouds(site) as warn:
        return announced(
            site, "spot warning, run moves to the spare", lambda host, _: warn(host),
            "cluster.spot_warnings=gcp",
        )  # fmt: skip


def warned_too_late(site: ClusterSite) -> Result:
    """A node's processes end between a cloud's warning and the save."""
    with clouds(site) as warn:
        return announced_too_late(
            site, "node's processes killed between spot warning and save", warn, site.hosts.kill,
            "cluster.spot_warnings=gcp",
        )  # fmt: skip


def drained_too_late(site: ClusterSite) -> Result:
    """A drained node vanishes before the run has saved; Ray, which drained it, forgets it."""

    def vanish(host: int) -> None:
        site.hosts.cut(host)
        site.hosts.kill(host)

    return announced_too_late(
        site, "node's power gone between drain notice and save",
        lambda host: site.cluster.drain(site.cluster.nodes()[site.hosts.address(host)]), vanish,
    )  # fmt: skip


def announced_too_late(
    site: ClusterSite,
    name: str,
    announce: Callable[[int], None],
    end: Callable[[int], None],
    *overrides: str,
) -> Result:
    """A node is lost before the run has saved: the loss was announced, so it isn't a failure."""

    def inject(run: Run, host: int) -> None:
        (pid,) = [r["pid"] for r in run.ranks() if r["node"] == site.hosts.address(host)]
        os.kill(pid, signal.SIGSTOP)  # so that it can't save
        announce(host)
        run.wait_for("notice", lambda: "will be preempted" in run.log.read_text())
        end(host)

    return inject_into_host(
        site, name, inject, "launch.max_failures=0", *overrides, rank=1, failures={"preempted"}
    )


@contextlib.contextmanager
def clouds(site: ClusterSite) -> Iterator[Callable[[int], None]]:
    """Gives each host Compute Engine's metadata service; returns what lets it warn a host."""
    site.cluster.repair()

    def say(host: int, preempted: str) -> None:
        said = site.folder / f"cloud_{host}/computeMetadata/v1/instance/preempted"
        said.parent.mkdir(parents=True, exist_ok=True)
        said.write_text(preempted)

    with contextlib.ExitStack() as services:
        for host in range(len(PLACES)):
            say(host, "FALSE")
            serve = [
                *(sys.executable, "-m", "http.server", str(METADATA_PORT)),
                *("--bind", "127.0.0.1", "--directory", str(site.folder / f"cloud_{host}")),
            ]
            service = subprocess.Popen(
                site.hosts.command(host, serve),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            services.callback(service.wait)
            services.callback(service.kill)
        yield lambda host: say(host, "TRUE")


def announced(
    site: ClusterSite, name: str, announce: Callable[[int, str], None], *overrides: str
) -> Result:
    """A preemption notice for a node: the run saves, and moves before the node is gone.

    `announce` gives it, by the host's number and Ray's id of the node.
    """
    whole = site.undisturbed(*LONG)
    result = Result(drill=name, detection_target=NODE_DETECTION, target=NODE_TARGET)
    site.cluster.repair()
    nodes = site.cluster.nodes()
    run = Run(site, slug(result.drill), *LONG, *overrides)
    with run.started() as process:
        run.wait_for_step(12)
        host, at = site.host_of(run, 1), time.time()
        announce(host, nodes[site.hosts.address(host)])
        result.next_step = run.next_step_after(at)
        process.wait(timeout=TIMEOUT_SECONDS)
    ended_well(run, process, result)
    moves, resumed = run.events("move"), run.events("resume")
    if "failure" in run.kinds() or len(moves) != 1:
        result.problems.append(f"not one move: {run.kinds()}")
    else:
        result.detected, result.said = time_of(moves[0]) - at, moves[0]["reason"]
        if resumed[-1]["step"] != moves[0]["step"]:
            result.problems.append(f"{resumed[-1]['step']}: steps were trained twice")
        if site.hosts.address(host) in {rank["node"] for rank in run.ranks()}:
            result.problems.append("the run is still on the node that is taken away")
    is_as_if_undisturbed(run, whole, result)
    return result


def agent_killed(site: ClusterSite) -> Result:
    """A node's agent dies, but not the node: another agent replaces it, and that is all."""
    whole = site.undisturbed(*LONG)
    result = Result(drill="kill -9 of a node's agent, not of its rank")
    site.cluster.repair()
    run = Run(site, slug(result.drill), *LONG)
    with run.started() as process:
        run.wait_for_step(12)
        host = site.host_of(run, 1)
        (first,) = agents(site, host)
        os.kill(first, signal.SIGKILL)
        at = time.time()
        run.wait_for("other agent", lambda: set(agents(site, host)) - {first})
        result.detected = time.time() - at
        process.wait(timeout=TIMEOUT_SECONDS)
    ended_well(run, process, result)
    if len(run.events("attempt")) != 1 or "failure" in run.kinds():
        result.problems.append(f"taken for its node: {run.kinds()}")
    result.said = "nothing, and training went on"
    is_as_if_undisturbed(run, whole, result)
    return result


def agents(site: ClusterSite, host: int) -> list[int]:
    """Returns the processes of a host's agent."""
    found = []
    for pid in site.hosts.pids(host):
        with contextlib.suppress(OSError):
            if b"NodeAgent" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def shrunk_and_grown(site: ClusterSite) -> Result:
    """A node is lost without a spare: the run continues on one rank, and on two once it is back."""
    result = Result(
        drill="node lost, no spare: shrinks, grows back",
        detection_target=NODE_DETECTION,
        target=NODE_TARGET,
    )
    whole = site.undisturbed(*LONG)
    site.cluster.repair()
    run = Run(site, slug(result.drill), *LONG)
    with run.started() as process:
        run.wait_for_step(12)
        used = [site.host_of(run, rank) for rank in (0, 1)]
        (spare,) = set(range(1, len(PLACES))) - set(used)
        site.hosts.kill(spare)
        at = time.time()
        site.hosts.kill(used[1])
        result.next_step = run.next_step_after(at)
        site.cluster.start(used[1])
        process.wait(timeout=TIMEOUT_SECONDS)
    ended_well(run, process, result)
    check_report(run, result, at, failures={"lost", "died"}, said=site.hosts.address(used[1]))
    sizes = [event["world_size"] for event in run.events("attempt")]
    if sizes != [2, 1, 2]:
        result.problems.append(f"attempts of {sizes} ranks, not of 2, 1 and 2")
    shared = run.events("resume")[0]["step"] if run.events("resume") else 0
    is_within_rounding(run, whole, result, shared=shared)
    return result


def is_within_rounding(run: Run, whole: Run, result: Result, *, shared: int) -> None:
    """Compares a run in several layouts with one in a single layout, from the checkpoint of the
    step that they share: as moetrain.verify compares layouts."""
    config = validated(yaml.safe_load((whole.folder / "config.yaml").read_text()), Config)
    limits = tolerances(
        config.model,
        seq_len=config.train.seq_len,
        num_tokens=config.train.seq_len * config.train.global_batch_size,
    )
    ours, theirs = run.metrics(), whole.metrics()
    if [r["step"] for r in ours] != [r["step"] for r in theirs]:
        result.problems.append(f"steps {[r['step'] for r in ours]}")
        return
    if ours[:shared] != theirs[:shared]:
        result.problems.append(f"other metrics before the loss, up to step {shared}")
    worst = 0.0
    for a, b in zip(ours[shared:], theirs[shared:], strict=True):
        off = abs(a["train/loss"] - b["train/loss"]) / abs(b["train/loss"])
        worst = max(worst, off)
        if off > limits.forward * (b["step"] - shared):
            result.problems.append(f"loss of step {b['step']} is off by {off:.1e}")
        if a["train/tokens"] != b["train/tokens"]:
            result.problems.append(f"step {b['step']} saw other tokens")
    at_loss, _ = read_plainly(whole.folder / f"checkpoints/step_{shared:08d}")
    final, _ = read_plainly(run.checkpoint())
    expected, _ = read_plainly(whole.checkpoint())
    steps, farthest = len(ours) - shared, 0.0
    for name, tensor in expected.items():
        if not name.startswith("model."):
            continue
        moved = norm(tensor - at_loss[name])
        allowed = limits.weights(steps=steps, size=norm(tensor), moved=moved)
        found = difference(name, final[name], tensor, allowed=allowed, scale=moved)
        farthest = max(farthest, found.relative)
        if not found.passes:
            result.problems.append(f"{name} is off by {found.relative:.1e} of {allowed:.1e}")
    result.curve = f"loss within {worst:.0e}, weights within {farthest:.0e} of their way"


DRILLS: dict[str, Callable[[ClusterSite], Result]] = {
    "rank": lambda site: replaced(
        site, "kill -9 of a rank on another host: all-to-all", on("all-to-all", "kill"),
        failure="died", notice=KILL_NOTICE, target=KILL_TARGET,
    ),
    "node": node_killed,
    "power": power_gone,
    "short-cut": short_cut,
    "cut-healed": cut_and_healed,
    "cut": cut_for_good,
    "driver": driver_killed,
    "head": head_killed,
    "drain": drained,
    "spot": warned,
    "spot-late": warned_too_late,
    "drain-late": drained_too_late,
    "elastic": shrunk_and_grown,
    "agent": agent_killed,
}  # fmt: skip
