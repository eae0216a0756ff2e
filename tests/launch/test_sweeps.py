"""Sweeps by `-m`: one trial after the other without a cluster, side by side on one, and a table."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from launch.sweeps.table import Result, Trial, result_of, varied_settings, write_table
from tests.launch.test_launching import TINY, kinds, reached, wait_for
from tests.support.held_run import PASS_HOLD, Hold, hold_environment
from tests.support.ray_head import RayHead, ray_head
from tests.support.runs import events_of, metrics_of, write_shards

ROOT = Path(__file__).parents[2]
BARE = [setting for setting in TINY if not setting.startswith("run.name")]
EXPERTS = "model.num_experts=2,4,8"

slow = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder in which a `Hold` holds the head's runs."""
    return tmp_path_factory.mktemp("held")


@pytest.fixture(scope="module")
def head(held: Path) -> Iterator[RayHead]:
    with ray_head(num_cpus=4, **hold_environment(held)) as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(head: RayHead, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a sweep of three trials of two ranks each on a cluster of four CPUs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with sweep(folder, shards, *on_cluster(), env=head.env) as process:
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    (folder / "output").write_text(output)
    (folder / "errors").write_text(errors)
    return folder


def on_cluster() -> list[str]:
    return [EXPERTS, "run.name=s", "launch.address=auto", "launch.num_workers=2", PASS_HOLD]


@contextlib.contextmanager
def sweep(
    folder: Path,
    shards: Path,
    *overrides: str,
    env: dict[str, str] | None = None,
    module: str = "moetrain",
) -> Iterator[subprocess.Popen[str]]:
    """Starts a sweep; whatever is left of it at the end is killed."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, "-m", *BARE, f"data.dir={shards}", *overrides],
        cwd=folder, env=env or os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def trials_of(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines that the newest sweep of a folder has left, best first."""
    newest = max((folder / "runs/sweeps").iterdir())
    return [json.loads(line) for line in (newest / "trials.jsonl").read_text().splitlines()]


def span_of(folder: Path, name: str) -> tuple[str, str]:
    """Returns when a run began and when it ended."""
    times = [event["time"] for event in events_of(folder, name)]
    return times[0], times[-1]


class TestAlone:
    pytestmark = slow

    def test_trials_run_one_after_the_other_and_a_failed_one_loses_no_other(
        self, tmp_path: Path, shards: Path
    ) -> None:
        (tmp_path / "runs/s-2/metrics.jsonl").mkdir(parents=True)  # can't be written
        settings = ["launch.mode=inline", "train.num_steps=6", "run.name=s"]
        with sweep(tmp_path, shards, *settings, "optim.lr=1e-5,1e-3,1e-2") as process:
            output, errors = process.communicate(timeout=350)
        assert process.returncode == 1, errors
        spans = [span_of(tmp_path, f"s-{n}") for n in (1, 2, 3)]
        assert spans[0][1] <= spans[1][0] <= spans[1][1] <= spans[2][0]
        trials = trials_of(tmp_path)
        assert [t["trial"] for t in trials] == [3, 1, 2], "best loss first, failed last"
        assert [t["end"] for t in trials] == ["done", "done", "failed"]
        assert trials[0]["varied"] == {"optim.lr": "0.01"}
        last = metrics_of(tmp_path, "s-3")[-1]
        assert trials[0]["validation_loss"] == last["validation/loss"]
        assert trials[0]["bits_per_byte"]["corpus"] == last["validation/corpus/bits_per_byte"]
        assert trials[0]["steps"] == 6
        assert trials[0]["tokens_per_second"] > 0
        table = output[output.index("sweep     2 done, 1 failed") :].splitlines()
        heads = ["trial", "optim.lr", "end", "parameters", "active", "steps", "tokens", "loss"]
        assert table[1].split()[: len(heads)] == heads
        assert [row.split()[0] for row in table[2:5]] == ["3", "1", "2"]
        assert "each arm has one seed" in output, "the comparison says what is missing"
        assert f"{last['validation/loss']:.3f}" in table[2]

        # The grid is extended in front: what is done is found again, whatever its number.
        before = {n: (tmp_path / f"runs/s-{n}/config.yaml").read_text() for n in (1, 3)}
        with sweep(tmp_path, shards, *settings, "optim.lr=3e-2,1e-5,1e-2") as process:
            _, errors = process.communicate(timeout=350)
        assert process.returncode == 0, errors
        again = {t["varied"]["optim.lr"]: t for t in trials_of(tmp_path)}
        assert {rate: Path(t["run"]).name for rate, t in again.items()} == {
            "0.03": "s-4", "1e-05": "s-1", "0.01": "s-3",
        }  # fmt: skip
        assert again["0.01"]["validation_loss"] == trials[0]["validation_loss"]
        assert again["0.03"]["validation_loss"] != trials[0]["validation_loss"]
        assert errors.count("done before") == 2
        assert before == {n: (tmp_path / f"runs/s-{n}/config.yaml").read_text() for n in (1, 3)}

    def test_a_combination_that_can_t_be_ends_the_sweep_before_it_begins(
        self, tmp_path: Path, shards: Path
    ) -> None:
        with sweep(tmp_path, shards, "launch.mode=inline", "model.top_k=2,9") as process:
            _, errors = process.communicate(timeout=100)
        assert process.returncode == 2
        assert "model.top_k=9" in errors
        assert not list(tmp_path.rglob("metrics.jsonl"))

    def test_a_killed_sweep_s_trial_saves_and_ends(self, tmp_path: Path, shards: Path) -> None:
        arguments = ["launch.mode=inline", "train.num_steps=100000", "optim.lr=1e-3,1e-2"]
        with sweep(tmp_path, shards, *arguments, "run.name=s") as process:
            wait_for(reached(tmp_path, 3, name="s-1"), "step 3", seconds=100)
            process.kill()
            process.wait()
            wait_for(lambda: "stop" in kinds(tmp_path, name="s-1"), "stop of the trial", seconds=60)
        assert not (tmp_path / "runs/s-2").exists()


class TestOnACluster:
    pytestmark = slow

    def test_as_many_trials_run_at_once_as_there_is_room_for(self, undisturbed: Path) -> None:
        (first, second, third) = sorted(span_of(undisturbed, f"s-{n}") for n in (1, 2, 3))
        assert second[0] < first[1], "two at once"
        assert third[0] > min(first[1], second[1]), "and the third when one has ended"
        trials = trials_of(undisturbed)
        losses = [t["validation_loss"] for t in trials]
        assert losses == sorted(losses)
        assert {t["end"] for t in trials} == {"done"}
        assert {t["varied"]["model.num_experts"] for t in trials} == {"2", "4", "8"}
        assert "sweep     3 done" in (undisturbed / "output").read_text()
        shown = (undisturbed / "errors").read_text()
        for number in (1, 2, 3):
            assert f"\n{number}| " in shown
            folder = max((undisturbed / "runs/sweeps").iterdir())
            assert "step 60/60" in (folder / f"trial_{number}.log").read_text()

    @pytest.mark.parametrize("how", ["Ctrl-C", "ray job stop"])
    def test_a_stop_saves_every_trial_and_the_same_command_goes_on(
        self,
        tmp_path: Path,
        head: RayHead,
        held: Path,
        shards: Path,
        undisturbed: Path,
        how: str,
    ) -> None:
        """`ray job stop` signals the sweep and its trials, which the sweep then signals as well."""
        module, hold = "moetrain" if how == "Ctrl-C" else "launch.submit", Hold(held, step=13)
        with sweep(tmp_path, shards, *on_cluster(), env=head.env, module=module) as process:
            wait_for(partial(hold.is_held, runs=2), "step 13 of both", seconds=500)
            process.send_signal(signal.SIGINT)
            for number in (1, 2):
                wait_for(partial(has_said, tmp_path, number, STOPPING), "stop", seconds=100)
            hold.release()
            output, errors = process.communicate(timeout=500)
        assert process.returncode == 75, errors + output
        ends = {t["trial"]: t["end"] for t in trials_of(tmp_path)}
        assert ends == {1: "stopped", 2: "stopped", 3: "not begun"}
        for name in ("s-1", "s-2"):
            last = events_of(tmp_path, name)[-1]
            latest = (tmp_path / f"runs/{name}/checkpoints/latest").read_text()
            assert (last["event"], latest) == ("stop", f"step_{last['step']:08d}")
        if how == "Ctrl-C":
            with sweep(tmp_path, shards, *on_cluster(), env=head.env) as process:
                _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors
            for name in ("s-1", "s-2", "s-3"):
                assert metrics_of(tmp_path, name) == metrics_of(undisturbed, name)


STOPPING = "stopping: checkpointing after this step"


def has_said(folder: Path, number: int, text: str) -> bool:
    """Returns whether a trial of the newest sweep has said something."""
    sweep_folder = max((folder / "runs/sweeps").iterdir())
    return text in (sweep_folder / f"trial_{number}.log").read_text()


def trial(number: int, folder: Path, **varied: str) -> Trial:
    return Trial(
        number=number, varied=varied, command=(), run_dir=folder / f"s-{number}", num_workers=1
    )


class TestTable:
    def test_only_what_differs_is_varied(self) -> None:
        found = varied_settings([["a=1", "+b=x", "c=3"], ["a=1", "+b=y", "c=3", "d=4"]])
        assert found == [{"b": "x"}, {"b": "y", "d": "4"}]

    def test_done_before_the_rest_and_better_before_worse(self, tmp_path: Path) -> None:
        done: dict[str, Any] = {"exit_code": 0, "steps": 9, "training_loss": 1.0}
        results = [
            Result(trial=trial(1, tmp_path, lr="1"), exit_code=-9, training_loss=0.1),
            Result(trial=trial(2, tmp_path, lr="2"), validation_loss=3.0, **done),
            Result(trial=trial(3, tmp_path, lr="3"), validation_loss=2.5, **done),
            Result(trial=trial(4, tmp_path, lr="4"), exit_code=None),
            Result(trial=trial(5, tmp_path, lr="5"), exit_code=75, training_loss=0.2),
        ]
        lines = write_table(results, tmp_path).splitlines()
        assert lines[0].startswith("sweep     2 done, 1 killed (9), 1 stopped, 1 not begun; ")
        assert [line.split()[0] for line in lines[2:]] == ["3", "2", "1", "5", "4"]
        assert "tokens/s" not in lines[1], "no column without a figure"
        assert (tmp_path / "table.txt").read_text().splitlines() == lines


def test_trials_are_ordered_by_validation_and_their_speed_is_the_median(tmp_path: Path) -> None:
    losses = {1: (2.0, None), 2: (3.0, 2.5), 3: (1.0, 2.1), 4: (1.5, None)}
    results = []
    for number, (loss, validation) in losses.items():
        folder = tmp_path / f"run_{number}"
        folder.mkdir()
        records = [
            {"step": step, "train/cross_entropy": loss, "perf/tokens_per_second": speed}
            for step, speed in ((1, 10.0), (2, 400.0), (3, 100.0))
        ]
        if validation is not None:
            records[-1]["validation/loss"] = validation
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "metrics.jsonl").write_text(lines)
        trial = Trial(number=number, varied={}, command=(), run_dir=folder, num_workers=1)
        results.append(result_of(trial, 0))
    assert {result.tokens_per_second for result in results} == {100.0}
    write_table(results, tmp_path)
    lines_of_table = (tmp_path / "trials.jsonl").read_text().splitlines()
    # Those that were validated first, by that loss; then the others by theirs.
    assert [json.loads(line)["trial"] for line in lines_of_table] == [3, 2, 4, 1]
