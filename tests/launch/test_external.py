"""Ranks of other launchers: taken where they can meet, refused where each would be a copy."""

import re

import pytest

from launch.external import (
    SLURM,
    ExternalRank,
    external_rank,
    first_host,
    meeting_point,
    slurm_port,
    tasks_by_node,
    visible_device,
)
from launch.plan import choose_plan
from moetrain.checks import ConfigError
from moetrain.settings import LaunchSettings

# The fourth of five tasks on two nodes, as Slurm 22.05 has it.
TASK = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "5", "SLURM_STEP_NUM_TASKS": "5", "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "3,2",
    "SLURM_STEP_NODELIST": "localhost,gpu[7-9]",
}  # fmt: skip
BATCH = {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "5"}
MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip


def numbers(rank: ExternalRank | None) -> tuple[int | None, ...] | None:
    if rank is None:
        return None
    return (rank.rank, rank.world_size, rank.local_rank, rank.local_world_size)


def test_tasks_of_plain_srun_are_ranks_that_meet_on_the_first_node() -> None:
    rank = external_rank(TASK)
    assert rank is not None
    assert numbers(rank) == (3, 5, 0, 2)
    met = meeting_point(rank, TASK, arguments=[])
    assert met == {"MASTER_ADDR": "localhost", "MASTER_PORT": str(slurm_port(TASK))}
    own = TASK | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "12345"}
    assert meeting_point(rank, own, arguments=[]) == {
        "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "12345",
    }  # fmt: skip
    one_node = TASK | {"SLURM_STEP_NUM_NODES": "1"}
    assert meeting_point(rank, one_node, arguments=[])["MASTER_ADDR"] == "127.0.0.1"


def test_a_first_node_whose_name_is_unknown_here_is_refused_with_the_way_out() -> None:
    unknown = TASK | {"SLURM_STEP_NODELIST": "node.invalid"}
    rank = external_rank(unknown)
    assert rank is not None
    with pytest.raises(ConfigError, match=r"node\.invalid .* `export MASTER_ADDR="):
        meeting_point(rank, unknown, arguments=[])


@pytest.mark.parametrize(
    "environ",
    [
        BATCH,  # a batch script
        TASK | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun with one task
        TASK | {"SLURM_STEP_ID": "4294967290"},  # the shell of salloc
        {"RANK": "0", "WORLD_SIZE": "1"},  # left over
        {"RANK": "0"},
        MPI | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {},
    ],
)
def test_a_single_process_is_on_its_own(environ: dict[str, str]) -> None:
    assert external_rank(environ) is None


def test_what_is_set_by_hand_for_slurms_tasks_leads_and_slurm_adds_the_rest() -> None:
    by_hand = TASK | {"RANK": "4", "WORLD_SIZE": "5", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    rank = external_rank(by_hand)
    assert numbers(rank) == (4, 5, 0, 2)
    assert rank is not None
    assert rank.launcher is not SLURM


def test_slurms_pmi_is_slurm_and_mpiruns_own_is_not() -> None:
    rank = external_rank(TASK | {"PMI_RANK": "3", "PMI_SIZE": "5"})
    assert rank is not None
    assert rank.launcher is SLURM
    inside = TASK | {"SLURM_STEP_NUM_TASKS": "2"} | MPI | {"OMPI_COMM_WORLD_SIZE": "8"}
    assert numbers(external_rank(inside)) == (1, 8, 1, 2)


BY_HAND = {"RANK": "3", "WORLD_SIZE": "5"}
MPIS = {
    "OMPI_COMM_WORLD_SIZE": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "num_devices", "device"),
    [
        (BY_HAND | {"LOCAL_RANK": "3"}, 8, 3),
        (BY_HAND | {"LOCAL_RANK": "3"}, 1, 0),  # --gpus-per-task: each sees its own
        (BY_HAND | {"LOCAL_RANK": "3"}, 0, 0),  # on a CPU
        (BY_HAND, 0, 0),
        (BY_HAND, 1, 0),
        (BY_HAND | MPIS, 2, 1),
        (BY_HAND | MPIS | {"LOCAL_RANK": "0"}, 2, 0),  # what is given by hand leads
        (BY_HAND | TASK | {"SLURM_LOCALID": "1"}, 2, 1),
        (TASK | {"SLURM_LOCALID": "2"}, 4, 2),
        (MPI, 2, 1),
    ],
)
def test_each_rank_of_a_machine_takes_a_device_of_its_own(
    environ: dict[str, str], num_devices: int, device: int
) -> None:
    rank = external_rank(environ)
    assert rank is not None
    assert visible_device(rank, environ, num_devices=num_devices) == device


@pytest.mark.parametrize(
    ("environ", "num_devices", "said"),
    [
        (BY_HAND, 4, "LOCAL_RANK=(missing): each of 5 ranks sees 4 GPUs"),
        # Counts of other processes: one task, in whose shell all of these ranks were started.
        (BY_HAND | BATCH, 4, "LOCAL_RANK=(missing): each of 5 ranks sees 4 GPUs"),
        (BY_HAND | MPIS | {"OMPI_COMM_WORLD_SIZE": "2"}, 4, "LOCAL_RANK=(missing)"),
        (
            BY_HAND | {"LOCAL_RANK": "3", "CUDA_VISIBLE_DEVICES": "0,1"},
            2,
            "LOCAL_RANK=3: this rank sees 2 GPUs (CUDA_VISIBLE_DEVICES=0,1): start at most 2",
        ),
        (TASK | {"SLURM_LOCALID": "2"}, 2, "SLURM_LOCALID=2: this rank sees 2 GPUs"),
    ],
)
def test_a_rank_without_a_device_of_its_own_is_refused_with_the_way_out(
    environ: dict[str, str], num_devices: int, said: str
) -> None:
    rank = external_rank(environ)
    assert rank is not None
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}"):
        visible_device(rank, environ, num_devices=num_devices)


def test_mpiruns_ranks_are_taken_with_a_place_to_meet_and_refused_without() -> None:
    rank = external_rank(MPI)
    assert rank is not None
    place = {"MASTER_ADDR": "h0", "MASTER_PORT": "29500"}
    assert meeting_point(rank, MPI | place, arguments=[]) == place
    with pytest.raises(ConfigError) as refused:
        meeting_point(rank, MPI, arguments=[])
    assert "`mpirun -x MASTER_ADDR=127.0.0.1 -x MASTER_PORT=29500`" in str(refused.value)
    with pytest.raises(ConfigError, match=r"^PMIX_RANK=1: .*`unset PMIX_RANK`"):
        external_rank({"PMIX_RANK": "1"})


def test_torchruns_variables_without_an_address_give_the_line_that_would_do() -> None:
    rank = external_rank({"RANK": "1", "WORLD_SIZE": "2"})
    assert rank is not None
    with pytest.raises(ConfigError) as refused:
        meeting_point(rank, {}, arguments=["run.name=essai été", "model=toy"])
    text = str(refused.value)
    line = "torchrun --standalone --nproc-per-node=2 -m moetrain 'run.name=essai été' model=toy"
    assert text.startswith("MASTER_ADDR=(missing): another launcher has started 2 ranks")
    assert f"`{line}`" in text


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK=one: must be a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2: isn't a rank of 2"),
    ],
)
def test_numbers_that_can_be_no_rank_are_named(environ: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}"):
        external_rank(environ)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("h0", "h0"), ("h[0-1]", "h0"), ("gpu[007-009,012],login1", "gpu007"),
        ("a-1,b", "a-1"), ("rack[1-2]node[3,5]", "rack1node3"), ("x[12]-ib,y", "x12-ib"),
    ],
)  # fmt: skip
def test_the_first_host_of_slurms_lists(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_tasks_of_each_node() -> None:
    assert list(tasks_by_node("2(x3),1")) == [2, 2, 2, 1]
    assert list(tasks_by_node("4")) == [4]


def test_steps_of_a_job_and_jobs_beside_each_other_meet_at_different_ports() -> None:
    places = [{"SLURM_JOB_ID": str(j), "SLURM_STEP_ID": str(s)} for j in (7, 8, 9) for s in (0, 1)]
    ports = [slurm_port(place) for place in places]
    assert len(set(ports)) == len(ports)
    assert all(1024 < port < 32768 for port in ports)


def given(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)


def test_each_task_of_srun_is_planned_as_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, TASK)
    plan = choose_plan(LaunchSettings(address="local"), device="cpu")
    assert (plan.mode, plan.num_workers, numbers(plan.external)) == ("external", 5, (3, 5, 0, 2))
    with pytest.raises(ConfigError, match=r"^launch.num_workers=4: .* 5 ranks"):
        choose_plan(LaunchSettings(address="local", num_workers=4), device="cpu")


def test_a_machine_has_as_many_gpus_as_torchrun_has_started_ranks_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given(monkeypatch, BY_HAND | {
        "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1",
    })  # fmt: skip
    assert choose_plan(LaunchSettings(), device="auto").gpus_per_node is None
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)  # each sees its own
    assert choose_plan(LaunchSettings(), device="auto").gpus_per_node == 2
    assert choose_plan(LaunchSettings(), device="cpu").gpus_per_node is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (LaunchSettings(mode="inline"), "launch.mode=inline: srun has started 5 processes"),
        (LaunchSettings(mode="ray"), "launch.mode=ray: srun has started 5 processes"),
        (LaunchSettings(address="10.0.0.1:6379"), "launch.address=10.0.0.1:6379: srun has"),
    ],
)
def test_a_task_that_would_begin_a_copy_of_the_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, settings: LaunchSettings, said: str
) -> None:
    given(monkeypatch, TASK)
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}"):
        choose_plan(settings, device="cpu")
    monkeypatch.setenv("SLURM_PROCID", "0")
    if settings.mode == "inline":  # the first may, as a script that starts Ray by itself does
        assert choose_plan(settings, device="cpu").mode == "inline"
