"""A large text is built by the nodes of a Ray cluster, each a network namespace of this machine."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipeline import BuildSettings, DataError, build_shards
from data_pipeline.building import parted_build
from data_pipeline.settings import BuildOn
from tests.data_pipeline.conftest import contents
from tests.data_pipeline.test_parted_build import (
    HIDDEN,
    PART_BYTES,
    SHARD_TOKENS,
    build_large,
    finished_parts,
    write_large,
)
from tests.drills.hosts import Cluster, Hosts, no_hosts_because

WHY_NOT = no_hosts_because()

# What the nodes import: a part is written after its node has said so.
TRACED = """
from pathlib import Path
import ray
from data_pipeline.building.parts import write_part

def traced(job, given):
    with Path(__file__).with_name("nodes.txt").open("a") as file:
        file.write(ray.util.get_node_ip_address() + "\\n")
    write_part(job, given)
"""

SCRIPT = f"""
import os, sys
import traced
from data_pipeline import BuildSettings, build_shards
from data_pipeline.building import parted_build

if __name__ == '__main__':
    parted_build._PART_BYTES = {PART_BYTES}
    parted_build.write_part = traced.traced
    text = os.path.abspath("text")
    sources = {{"lines": "lines", "files": "files", "small": "small.jsonl"}}
    build_shards(BuildSettings(
        sources={{name: {{"corpus": os.path.join(text, path)}} for name, path in sources.items()}},
        to="to", tokenizer="mixtral-v1", shard_tokens={SHARD_TOKENS}, validation_fraction=0.2,
        on="ray", ray_address=sys.argv[1]))
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Two nodes of one core, which find this package and `traced`."""
    paths = [str(Path(__file__).parents[2]), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    (tmp_path / "traced.py").write_text(TRACED)
    (tmp_path / "script.py").write_text(SCRIPT)
    with (
        Hosts(2) as hosts,
        Cluster(
            hosts, places=(1, 1), environment=environment, log=tmp_path / "cluster.log"
        ) as cluster,
    ):
        yield cluster


def start(cluster: Cluster, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "script.py", cluster.address]
    return subprocess.Popen(cluster.hosts.command(0, command), cwd=folder, env=cluster.environment)


def wait_until(is_time: Callable[[], bool], build: subprocess.Popen[bytes]) -> None:
    while not is_time():
        assert build.poll() is None, "it ended before its time"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(WHY_NOT is not None, reason=f"no hosts here: {WHY_NOT}")
def test_two_nodes_build_what_one_process_does_killed_in_the_middle_or_not(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = write_large(tmp_path / "text")
    monkeypatch.setattr(parted_build, "_PART_BYTES", PART_BYTES)
    expected = contents(build_large(sources, tmp_path / "here", tokenizer="mixtral-v1").path)
    hidden, nodes = tmp_path / HIDDEN, tmp_path / "nodes.txt"
    with start(cluster, tmp_path) as build:
        wait_until(lambda: len(finished_parts(hidden)) >= 4, build)
        build.send_signal(signal.SIGKILL)
    before = finished_parts(hidden)
    num_started = len(nodes.read_text().split())
    with start(cluster, tmp_path) as build:
        # Both nodes work before one loses its power, with a part on it.
        wait_until(
            lambda: (
                {cluster.hosts.address(n) for n in (0, 1)}
                <= set(nodes.read_text().split()[num_started:])
            ),
            build,
        )
        cluster.hosts.kill(1)
        assert build.wait(timeout=300) == 0
    assert before
    assert contents(tmp_path / "to") == expected
    assert not hidden.exists()


def test_no_cluster_is_reported_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parted_build, "_PART_BYTES", PART_BYTES)
    sources = write_large(tmp_path / "text")
    settings = BuildSettings(
        corpus=str(sources["lines"]),
        to=str(tmp_path / "to"),
        tokenizer="bytes",
        shard_tokens=SHARD_TOKENS,
        on=BuildOn.ray,
        ray_address="127.0.0.1:1",
    )
    with pytest.raises(DataError, match=r"on='ray': no Ray cluster answers at ray_address='127"):
        build_shards(settings, progress=False)
