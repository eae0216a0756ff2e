"""`python -m launch.submit` and `ray job submit` against a real Ray head, with real jobs."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.submit.__main__ import training_arguments
from launch.submit.job import entrypoint
from moetrain.checks import ConfigError
from tests.launch.test_launching import TINY, alive, kinds, rank_pids, reached, wait_for
from tests.support.held_run import PASS_HOLD, Hold, hold_environment
from tests.support.ray_head import RayHead, ray_head
from tests.support.runs import events_of, metrics_of, write_shards

ROOT = Path(__file__).parents[2]
TWO_RANKS = ["launch.num_workers=2"]

slow = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder in which a `Hold` holds the head's runs."""
    return tmp_path_factory.mktemp("held")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, held: Path) -> Iterator[RayHead]:
    home = tmp_path_factory.mktemp("home")
    with ray_head(num_cpus=4, HOME=str(home), **hold_environment(held)) as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(
    head: RayHead, shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Returns the metrics of `python -m moetrain` on the head node, with nothing happening."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = subprocess.run(
        [sys.executable, "-m", "moetrain", *overrides(shards), "launch.address=auto"],
        cwd=folder, env=head.env, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    nodes = {rank["node"] for event in attempts(folder) for rank in event["ranks"]}
    assert nodes == {head.address.rpartition(":")[0]}, "on the cluster that runs here"
    return metrics_of(folder)


def overrides(shards: Path, *more: str) -> list[str]:
    return [*TINY, *TWO_RANKS, f"data.dir={shards}", *more]


def attempts(folder: Path) -> list[dict[str, Any]]:
    return [event for event in events_of(folder) if event["event"] == "attempt"]


@contextlib.contextmanager
def submitted(
    head: RayHead, folder: Path, *arguments: str, **env: str
) -> Iterator[subprocess.Popen[str]]:
    """Starts the command at a folder of the head node's machine; it is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.submit", *arguments], cwd=folder, env=head.env | env,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def submit(
    head: RayHead, folder: Path, *arguments: str, **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end."""
    with submitted(head, folder, *arguments, **env) as process:
        output, errors = process.communicate(timeout=200)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def ray_job(head: RayHead, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs Ray's own `ray job …` against the head."""
    return subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "job", *arguments],
        env=head.env | {"RAY_API_SERVER_ADDRESS": head.dashboard} | env,
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


def post(head: RayHead, path: str) -> None:
    """Sends what Ray's own commands send."""
    token = Path(head.env["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = urllib.request.Request(
        head.dashboard + path, method="POST", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 200


def at(head: RayHead) -> str:
    return f"launch.address={head.dashboard}"


class TestExitCodes:
    pytestmark = slow

    def test_a_job_that_ends_gives_0_and_the_same_metrics_and_its_log_comes_as_it_is_written(
        self, tmp_path: Path, head: RayHead, shards: Path, undisturbed: list[dict[str, Any]]
    ) -> None:
        with submitted(head, tmp_path, *overrides(shards), at(head)) as process:
            assert process.stdout is not None
            seen = next(line for line in process.stdout if "step 1/60" in line)
            assert "tokens/s" in seen
            assert reached(tmp_path, 1)()
            assert "finish" not in kinds(tmp_path), "while it trains"
            rest, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        assert "nats/token on held-out text" in rest
        assert metrics_of(tmp_path) == undisturbed

    def test_what_only_the_job_can_know_to_be_wrong_gives_2(
        self, tmp_path: Path, head: RayHead
    ) -> None:
        done = submit(head, tmp_path, *TINY, *TWO_RANKS, "data.dir=/nowhere", at(head))
        assert done.returncode == 2, done.stderr
        assert "/nowhere" in done.stdout

    def test_a_failed_run_gives_1(self, tmp_path: Path, head: RayHead, shards: Path) -> None:
        (tmp_path / "runs/tiny/metrics.jsonl").mkdir(parents=True)
        done = submit(head, tmp_path, *overrides(shards), at(head))
        assert done.returncode == 1, done.stderr
        assert "metrics.jsonl" in done.stdout

    @pytest.mark.parametrize("how", ["Ctrl-C", "ray job stop"])
    def test_a_stop_saves_and_gives_75_and_submitting_again_goes_on(
        self,
        tmp_path: Path,
        head: RayHead,
        shards: Path,
        undisturbed: list[dict[str, Any]],
        how: str,
        held: Path,
    ) -> None:
        hold = Hold(held, step=13)
        with submitted(head, tmp_path, *overrides(shards, PASS_HOLD), at(head)) as process:
            job = submission(process)
            wait_for(hold.is_held, "step 13", seconds=120)
            if how == "Ctrl-C":
                process.send_signal(signal.SIGINT)
            else:
                post(head, f"/api/jobs/{job}/stop")
            assert process.stdout is not None
            text = "stopping: checkpointing after this step"
            assert next((line for line in process.stdout if text in line), None)
            hold.release()
            output, errors = process.communicate(timeout=100)
        assert process.returncode == 75, errors + output
        last = events_of(tmp_path)[-1]
        assert last["event"] == "stop"
        latest = (tmp_path / "runs/tiny/checkpoints/latest").read_text()
        assert latest == f"step_{last['step']:08d}"
        done = submit(head, tmp_path, *overrides(shards), at(head))
        assert done.returncode == 0, done.stderr
        assert [e["step"] for e in events_of(tmp_path) if e["event"] == "resume"] == [last["step"]]
        assert metrics_of(tmp_path) == undisturbed

    def test_a_second_ctrl_c_ends_the_job_at_once(
        self, tmp_path: Path, head: RayHead, shards: Path
    ) -> None:
        arguments = overrides(shards, "train.num_steps=100000")
        with submitted(head, tmp_path, *arguments, at(head)) as process:
            job = submission(process)
            wait_for(reached(tmp_path, 3), "step 3", seconds=120)
            ranks = rank_pids(tmp_path)
            os.kill(ranks[1], signal.SIGSTOP)  # so that the first alone would not end it
            process.send_signal(signal.SIGINT)
            time.sleep(8.0)
            assert process.poll() is None, "Ray's own 3 s would be over"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert f"ending {job} at once" in errors
        wait_for(lambda: not any(map(alive, ranks)), "end of the ranks", seconds=30)
        assert "stop" not in kinds(tmp_path)


class TestConnections:
    pytestmark = slow

    def test_a_lost_connection_is_named_and_made_again_and_a_job_can_be_attached_to(
        self, tmp_path: Path, head: RayHead, shards: Path, undisturbed: list[dict[str, Any]]
    ) -> None:
        with relay(head.dashboard) as road:
            through = f"launch.address={road.address}"
            with submitted(head, tmp_path, *overrides(shards), through) as process:
                job = submission(process)
            # That one is gone; its job isn't.
            with submitted(head, tmp_path, f"submit.attach={job}", through) as process:
                assert process.stdout is not None
                seen = next(line for line in process.stdout if "step 1/60" in line)
                road.cut()
                time.sleep(2.0)
                road.heal()
                rest, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        assert f"no connection to {road.address}" in errors
        assert "connected again" in errors
        assert (seen + rest).count("step 1/60") == 1, "the log goes on where it was"
        assert "nats/token on held-out text" in rest
        assert metrics_of(tmp_path) == undisturbed

    def test_a_connection_that_stays_lost_ends_the_waiting_with_the_command_to_go_on(
        self, tmp_path: Path, head: RayHead, shards: Path
    ) -> None:
        with relay(head.dashboard) as road:
            arguments = [*overrides(shards), "train.num_steps=100000", "submit.give_up_seconds=3"]
            through = f"launch.address={road.address}"
            with submitted(head, tmp_path, *arguments, through) as process:
                job = submission(process)
                road.cut()
                _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "the job may continue" in errors
        assert f"submit.attach={job}" in errors
        assert ray_job(head, "stop", job).returncode == 0
        unknown = submit(head, tmp_path, "submit.attach=raysubmit_none", at(head))
        assert unknown.returncode == 1
        assert "raysubmit_none" in unknown.stderr

    def test_a_dead_address_is_named_quickly(self, tmp_path: Path, head: RayHead) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            dead = f"http://127.0.0.1:{probe.getsockname()[1]}"
        begun = time.monotonic()
        done = submit(head, tmp_path, *TINY, f"launch.address={dead}")
        assert done.returncode == 1
        assert dead in done.stderr
        assert "Traceback" not in done.stderr
        assert time.monotonic() - begun < 60

    def test_without_a_cluster_auto_says_so(self, tmp_path: Path) -> None:
        env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        done = subprocess.run(
            [sys.executable, "-m", "launch.submit", "launch.address=auto"], cwd=tmp_path,
            env=env | {"RAY_TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert "launch.address=auto: no Ray cluster runs on this machine" in done.stderr


class TestFolders:
    pytestmark = slow

    @pytest.mark.parametrize("how", ["ray job submit", "launch.submit"])
    def test_a_copied_checkout_is_what_trains_and_its_runs_outlast_the_copy(
        self, tmp_path: Path, head: RayHead, shards: Path, how: str
    ) -> None:
        """Submitted as from another machine: with its folder, of which every node gets a copy."""
        checkout, name = tmp_path / "checkout", f"run.name={how.replace(' ', '-')}"
        for part in ("moetrain", "launch", "data_pipeline", "conf"):
            shutil.copytree(
                ROOT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__")
            )
        shutil.copy(checkout / "conf/model/toy.yaml", checkout / "conf/model/only_here.yaml")
        (checkout / "data").mkdir()
        (checkout / "data/large").write_text(how)
        arguments = [
            "model=only_here", "+experiment=toy", *overrides(shards), "train.num_steps=3",
            "schedule.warmup_steps=1", "data=stdlib", name,
        ]  # fmt: skip
        if how == "launch.submit":
            away = {"RAY_TMPDIR": str(tmp_path)}  # where there is no session of this head
            done = submit(head, checkout, *arguments, at(head), **away)
        else:
            command = ["--", "python", "-m", "moetrain", *arguments]
            done = ray_job(head, "submit", "--working-dir", str(checkout), *command)
        assert done.returncode == 0, done.stdout + done.stderr
        run = Path(head.env["HOME"], "runs", name.partition("=")[2])
        assert f"the run is kept in {run}" in done.stdout
        assert (run / "report.html").is_file()
        copies = head.tmp.glob("ray/session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
        copied = {(copy / "data/large").is_file() for copy in copies}
        assert (how == "ray job submit") in copied, "data stays here, with launch.submit"

    def test_a_folder_without_moetrain_is_refused(self, tmp_path: Path, head: RayHead) -> None:
        done = submit(head, tmp_path, *TINY, at(head), f"submit.working_dir={tmp_path}")
        assert done.returncode == 2
        assert f"submit.working_dir={tmp_path}: has no moetrain/__main__.py" in done.stderr

    def test_a_folder_too_large_for_ray_is_refused_with_its_size(
        self, tmp_path: Path, head: RayHead
    ) -> None:
        (tmp_path / "moetrain").mkdir()
        (tmp_path / "moetrain/__main__.py").touch()
        with (tmp_path / "weights").open("wb") as file:
            file.truncate(101 * 2**20)
        done = submit(head, tmp_path, *TINY, at(head), f"submit.working_dir={tmp_path}")
        assert done.returncode == 1
        assert "has 101 MiB, and Ray's job server takes 100 MiB" in done.stderr


class TestAccess:
    pytestmark = slow

    @pytest.fixture
    def here(self) -> str:
        """Returns this machine's address for others."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))  # sends nothing
            except OSError:
                pytest.skip("this machine has no address but its loopback")
            return str(probe.getsockname()[0])

    def test_a_server_that_wants_a_token_gets_jobs(self, tmp_path: Path, here: str) -> None:
        with ray_head(num_cpus=1, dashboard_host=here, PYTHONPATH=str(ROOT)) as wide:
            done = submit(wide, tmp_path, *TINY, "data.dir=/nowhere", at(wide))
        assert done.returncode == 2
        assert "/nowhere" in done.stdout, done.stderr

    def test_a_server_that_takes_anybody_s_jobs_gets_none_unless_insisted(
        self, tmp_path: Path, here: str
    ) -> None:
        disabled = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": ""}
        with ray_head(num_cpus=1, dashboard_host=here, **disabled) as wide:
            refused = submit(wide, tmp_path, *TINY, at(wide))
            insist = ["data.dir=/nowhere", "launch.allow_unauthenticated=true"]
            taken = submit(wide, tmp_path, *TINY, *insist, at(wide), PYTHONPATH=str(ROOT))
        assert refused.returncode == 2, refused.stderr
        assert f"launch.address={wide.dashboard}: this Ray cluster accepts jobs" in refused.stderr
        for part in ("CVE-2023-48022", "RAY_AUTH_MODE=token", "launch.allow_unauthenticated=true"):
            assert part in refused.stderr
        assert taken.returncode == 2
        assert "/nowhere" in taken.stdout, taken.stderr


class TestBeforeAnythingIsSubmitted:
    @pytest.mark.parametrize(
        ("argument", "said"),
        [
            ("train.steps=4", "train.steps"),
            ("model.top_k=9", "model.top_k=9"),
            ("cluster.env.WANDB_API_KEY=12345", "cluster.env.WANDB_API_KEY=[redacted]"),
        ],
    )
    def test_a_mistake_exits_2_without_a_cluster(
        self, tmp_path: Path, argument: str, said: str
    ) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "launch.submit", argument, "launch.address=http://127.0.0.1:1"],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert said in done.stderr
        assert "12345" not in done.stderr
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "argument",
        [
            "cluster.env.SOME_SECRET=abc",
            "+cluster.env.hf_token=abc",
            "checkpoint.upload_to=s3://name:password@host/bucket",
            f"cluster.env.X=ghp_{'0123456789' * 4}",
        ],
    )
    def test_a_secret_is_refused(self, argument: str) -> None:
        with pytest.raises(ConfigError, match=r"=\[redacted\]: looks like a secret"):
            training_arguments([argument])

    def test_all_but_the_submission_s_own_settings_are_passed_on(self) -> None:
        kept = ["-m", "+model=8x7b", "data.tokenizer=mixtral-v1", "launch.pass_env=[WANDB_API_KEY]"]
        own = ["launch.address=auto", "submit.python=python3", "++submit.stop_seconds=9"]
        assert training_arguments([*own, *kept]) == kept


def test_the_shell_of_a_job_says_the_code_of_a_command_that_was_stopped_with_it(
    tmp_path: Path,
) -> None:
    """Ray signals both."""
    (tmp_path / "moetrain").mkdir()
    (tmp_path / "moetrain/__main__.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), sys.exit(75)))\n"
        "print('ready', sys.argv[1:], flush=True)\n"
        "time.sleep(60)\n"
    )
    shell = subprocess.Popen(
        entrypoint(["optim.betas=[0.9, 0.99]"], python=sys.executable, folder=str(tmp_path)),
        shell=True, text=True, stdout=subprocess.PIPE, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert shell.stdout is not None
    assert shell.stdout.readline() == "ready ['optim.betas=[0.9, 0.99]']\n"
    os.killpg(shell.pid, signal.SIGTERM)
    assert shell.communicate(timeout=30)[0] == "moetrain exit code 75\n"
    assert shell.returncode == 75


def submission(process: subprocess.Popen[str]) -> str:
    """Waits until a command has submitted its job; returns the job's id."""
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.match(r"submitted (\S+); to wait for it again: ", line):
            return found[1]
    raise AssertionError("nothing was submitted")


class Relay:
    """A road to a server that can be cut: what goes there, and what comes back, goes through it."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._open: list[socket.socket] = []
        self._is_cut = False
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._is_cut = True
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def heal(self) -> None:
        self._is_cut = False

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self.listener.accept()[0]
                if self._is_cut:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self._to))
                self._open += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pass(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@contextlib.contextmanager
def relay(dashboard: str) -> Iterator[Relay]:
    road = Relay(int(dashboard.rpartition(":")[2]))
    try:
        yield road
    finally:
        road.cut()
        road.listener.close()
