"""What ranks get of the command's environment: what is listed and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.threads import WAITING
from launch.environment import for_ranks, reduced
from moetrain.checks import ConfigError
from tests.launch.test_ray_access import head

SHELL = {
    "PATH": "/usr/bin", "HOME": "/root", "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "2",
    "WANDB_API_KEY": "wandb-key", "WANDB_PROJECT": "moe", "AWS_SECRET_ACCESS_KEY": "aws-secret",
    "AWS_REGION": "eu-1", "HTTPS_PROXY": "http://ann:pw-of-ann@proxy:1", "SESSION_COOKIE": "c00kie",
    "MY_FLAG": "on", "MY_TOKEN": "my-own-token", "SSH_AUTH_SOCK": "/tmp/agent",
}  # fmt: skip


def test_ranks_get_what_is_listed_and_secrets_apart() -> None:
    got = for_ranks(SHELL, cluster_env={"NCCL_DEBUG": "WARN", "DB_PASSWORD": "x"}, pass_env=[])
    assert got.public == {
        "NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": "2", "WANDB_PROJECT": "moe", "AWS_REGION": "eu-1",
    }  # fmt: skip
    assert got.secret == {
        "WANDB_API_KEY": "wandb-key", "AWS_SECRET_ACCESS_KEY": "aws-secret", "DB_PASSWORD": "x",
        "HTTPS_PROXY": "http://ann:pw-of-ann@proxy:1",
    }  # fmt: skip


def test_the_clusters_word_on_waiting_threads_replaces_the_commands() -> None:
    shell = {"GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": "2"}
    active = {"OMP_WAIT_POLICY": "active"}
    assert for_ranks(shell, cluster_env={}, pass_env=[]).public == shell
    got = for_ranks(shell, cluster_env=active, pass_env=[])
    assert got.public == {"OMP_NUM_THREADS": "2"} | active


def test_a_secret_within_a_variable_of_many_settings_is_one() -> None:
    options = '{"key": "minio-user", "secret": "minio-pass", "endpoint_url": "http://minio:9000"}'
    shell = {"FSSPEC_S3": options, "FSSPEC_S3_ENDPOINT_URL": "http://minio:9000"}
    got = for_ranks(shell, cluster_env={}, pass_env=[])
    assert got.public == {"FSSPEC_S3_ENDPOINT_URL": "http://minio:9000"}
    assert got.secret == {"FSSPEC_S3": options}


def test_only_the_first_rank_may_write_to_wandb() -> None:
    got = for_ranks(SHELL, cluster_env={}, pass_env=[])
    assert "WANDB_API_KEY" in got.secrets_of(0)
    assert got.secrets_of(1) == {
        k: v for k, v in got.secret.items() if k != "WANDB_API_KEY"
    }  # fmt: skip


def test_more_is_passed_by_name_or_pattern_and_a_name_that_is_not_set_is_refused() -> None:
    got = for_ranks(SHELL, cluster_env={}, pass_env=["MY_*", "YOUR_*"])
    assert got.public["MY_FLAG"] == "on"
    assert got.secret["MY_TOKEN"] == "my-own-token"
    with pytest.raises(ConfigError, match=r"^launch.pass_env=MY_FLAGS: isn't set"):
        for_ranks(SHELL, cluster_env={}, pass_env=["MY_FLAGS"])


def test_a_process_is_as_before_after_it_was_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SHELL.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with reduced(for_ranks(os.environ, cluster_env={"FI_PROVIDER": "efa"}, pass_env=[])):
        assert not {"SESSION_COOKIE", "SSH_AUTH_SOCK", "WANDB_API_KEY"} & set(os.environ)
        assert os.environ["FI_PROVIDER"] == "efa"
        os.environ["RAY_CLIENT_MODE"] = "0"
    assert dict(os.environ) == before | {"RAY_CLIENT_MODE": "0"}


RANKS = """
import json, os, sys
from pathlib import Path
import ray
from launch.environment import for_ranks
from launch.placement import Share
from launch.on_ray.cluster import RayCluster

environment = for_ranks(os.environ, cluster_env={"FI_PROVIDER": "efa"}, pass_env=["MY_FLAG"])
cluster = RayCluster.connect(sys.argv[1] or None, num_workers=2, environment=environment)
gpus = cluster.gpus_per_node()
cluster.look()
(node,) = cluster.nodes(on_gpu=False)
shares = [Share(node=node, num_ranks=2)]
assert cluster.reserve(shares, on_gpu=False)
workers = cluster.start_workers(
    shares, survivors=[], on_gpu=False, log_dir=Path(sys.argv[2]), interrupted=lambda: None
)
environs = ray.get([w.actor.__ray_call__.remote(lambda self: dict(os.environ)) for w in workers])
told = ray.get(workers[0].actor.__ray_call__.remote(
    lambda self: str(dict(ray.get_runtime_context().runtime_env))))
shown = told + str(ray._private.state.actors()) + str(ray._private.state.jobs())
cluster.disconnect()
print(json.dumps([environs, shown, dict(os.environ), gpus]))
"""


def ranks(
    address: str, folder: Path, *, gpus: int | None = None, **environ: str
) -> tuple[list[dict[str, str]], str]:
    """Returns the environments of two real ranks, and all that Ray tells of them."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", RANKS, address, str(folder)],
        env=kept | {k: v for k, v in SHELL.items() if k not in ("PATH", "HOME")} | environ,
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer: list[Any] = json.loads(done.stdout)
    assert answer[2]["SESSION_COOKIE"] == "c00kie"  # the command itself has all it had
    assert answer[3] == gpus, "of a node"
    return answer[0], answer[1]


def check_ranks(environs: list[dict[str, str]], shown: str) -> None:
    first, second = environs
    for environ in environs:
        assert environ["OMP_NUM_THREADS"] == "2"
        assert set(WAITING) & set(environ), "how threads wait, which the command has decided"
        assert environ["FI_PROVIDER"] == "efa"
        assert environ["MY_FLAG"] == "on"
        assert environ["AWS_SECRET_ACCESS_KEY"] == "aws-secret"
        assert not {"SESSION_COOKIE", "SSH_AUTH_SOCK", "MY_TOKEN"} & set(environ)
    assert first["WANDB_API_KEY"] == "wandb-key"
    assert "WANDB_API_KEY" not in second
    for secret in ("wandb-key", "aws-secret", "pw-of-ann"):
        assert secret not in shown


@pytest.mark.slow
def test_ranks_on_this_machine(tmp_path: Path) -> None:
    environs, shown = ranks("", tmp_path)
    check_ranks(environs, shown)
    for environ in environs:  # their connections stay on this machine
        assert environ["GLOO_SOCKET_IFNAME"] == "lo"
        assert environ["NCCL_SOCKET_IFNAME"] == "=lo"


@pytest.mark.slow
def test_ranks_on_a_cluster(tmp_path: Path) -> None:
    """Its nodes have nothing of the command's environment, and Ray shows whatever it is given."""
    token = "c" * 64
    with head(tmp_path, port=17321, token=token, num_cpus=2, num_gpus=4) as address:
        environs, shown = ranks(address, tmp_path, gpus=4, RAY_AUTH_TOKEN=token)
        check_ranks(environs, shown)
        assert "NCCL_DEBUG" in shown  # so that secrets would be found there as well
