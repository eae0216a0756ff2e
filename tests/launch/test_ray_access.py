"""Who may command Ray: real clusters with and without a token, and the one a run starts."""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from launch.on_ray.access import require_access
from launch.on_ray.cluster import RayCluster
from moetrain.checks import ConfigError
from tests.launch.test_launching import RAY, reached, started, wait_for
from tests.support.processes import environment_of, family_of, listening, title_of
from tests.support.runs import write_shards

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ASK = """
import json, os, sys, time
from launch.on_ray.access import require_access
from moetrain.checks import ConfigError
clean, said = dict(os.environ), []
for environ, address, insist in json.loads(sys.argv[1]):
    os.environ.clear()
    os.environ.update(clean | environ)
    begin = time.monotonic()
    try:
        said.append("at " + require_access(address, allow_unauthenticated=insist))
    except (ConfigError, OSError) as error:
        said.append(f"{type(error).__name__} {error}")
    assert time.monotonic() - begin < 5, said  # never a wait of minutes
print(json.dumps(said))
"""


@contextlib.contextmanager
def head(
    folder: Path, *, port: int, token: str | None, num_cpus: int = 1, num_gpus: int = 0
) -> Iterator[str]:
    """Runs the head node of a cluster as `ray start` does; yields its true address."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token" if token else "disabled"}
    environ |= {"RAY_AUTH_TOKEN": token} if token else {}
    log = (folder / f"head{port}.log").open("w+")
    process = subprocess.Popen(
        [
            Path(sys.executable).with_name("ray"), "start", "--head", "--block", f"--port={port}",
            f"--ray-client-server-port={port + 1}", "--include-dashboard=false",
            f"--num-cpus={num_cpus}", f"--num-gpus={num_gpus}",
            "--object-store-memory=100000000", f"--temp-dir=/tmp/ray-{os.getpid()}-{port}",
            "--log-color=false",
            "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0",
        ],
        env=environ, start_new_session=True, stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:

        def address() -> str | None:
            found = re.search(r"Local node IP: (\S+)", (folder / f"head{port}.log").read_text())
            return found and found[1]

        host = wait_for(address, "head node")
        for door in (port, port + 1):
            wait_for(partial(answers, host, door), f"port {door}")
        yield f"{host}:{port}"
    finally:
        for pid in family_of(process.pid):  # politely it would take half a minute
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(f"/tmp/ray-{os.getpid()}-{port}", ignore_errors=True)
        log.close()


def answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 1).close()
    except OSError:
        return False
    return True


def ask(home: Path, *questions: tuple[dict[str, str], str, bool], **environ: str) -> list[str]:
    """Returns what a fresh process with an empty home says of clusters.

    A question is an environment, an address, and whether anything is allowed.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(questions)],
        env=kept | {"HOME": str(home)} | environ,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def test_a_cluster_that_takes_commands_from_anybody_is_refused_unless_insisted(
    tmp_path: Path,
) -> None:
    with head(tmp_path, port=17301, token=None) as address:
        door = address.replace(":17301", ":17302")
        # A token that is sent changes nothing: nobody there looks at it.
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
        told = [
            ({}, address, address),
            (token, address, address),
            ({}, "127.0.0.1:17301", f"127.0.0.1:17301 ({address})"),
            ({"RAY_ADDRESS": address}, "auto", f"auto ({address})"),
            ({}, f"ray://{door}", f"ray://{door}"),
            ({}, "ray://127.0.0.1:17302", "ray://127.0.0.1:17302"),
        ]
        *refusals, insisted = ask(
            tmp_path, *((environ, where, False) for environ, where, _ in told), ({}, address, True)
        )
        for said, (_, _, shown) in zip(refusals, told, strict=True):
            assert said.startswith(f"ConfigError launch.address={shown}: this Ray cluster accepts")
            for part in ("CVE-2023-48022", "ray get-auth-token --generate", "RAY_AUTH_MODE=token",
                         "launch.allow_unauthenticated=true"):  # fmt: skip
                assert part in said
        assert insisted == f"at {address}"
        # The command refuses as early: nothing is written, and no shards are built.
        refused = subprocess.run(
            [sys.executable, "-m", "moetrain", f"launch.address={address}", *RAY],
            cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert refused.returncode == 2, refused.stderr
        assert refused.stderr.startswith(f"moetrain: launch.address={address}: this Ray cluster")
        assert not (tmp_path / "runs").exists()
        assert not (tmp_path / "data").exists()


def test_a_cluster_with_a_token_is_used_with_that_token_alone(tmp_path: Path) -> None:
    token = secrets.token_hex(32)
    (tmp_path / "home/.ray").mkdir(parents=True)
    (tmp_path / "home/.ray/auth_token").write_text(token)
    with head(tmp_path, port=17311, token=token) as address:
        wrong, right = {"RAY_AUTH_TOKEN": "b" * 64}, {"RAY_AUTH_TOKEN": token}
        home = {"HOME": str(tmp_path / "home")}
        for where in (address, f"ray://{address.replace(':17311', ':17312')}"):
            environs: list[dict[str, str]] = [{}, wrong, right, home]
            missing, refused, *taken = ask(tmp_path, *((e, where, False) for e in environs))
            assert "requires a token, and none is set here: set RAY_AUTH_TOKEN" in missing
            assert "rejects the token that is set here" in refused
            assert taken == [f"at {where}"] * 2
        # And Ray itself then gets through, though nothing in the environment told it to.
        connect = (
            "from launch.on_ray.cluster import RayCluster; import sys\n"
            "print(RayCluster.connect(sys.argv[1]).fitting_workers())"
        )
        environ = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        done = subprocess.run(
            [sys.executable, "-c", connect, address],
            env=environ | {"HOME": str(tmp_path / "home")},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.stdout == "1\n", done.stderr


def test_a_command_line_with_a_secret_is_not_brought_to_a_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray shows the command lines of all that use a cluster."""
    monkeypatch.setattr(sys, "argv", ["moetrain", "cluster.env.HF_TOKEN=abc"])
    with pytest.raises(ConfigError, match=r"^cluster.env.HF_TOKEN=\[redacted\]: is a secret, and"):
        RayCluster.connect("192.0.2.1:6379")


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:8265", "10.0.0.1", "localhost", "ray://head", "head:port", ":6379"],
)
def test_what_is_no_address_of_a_cluster_is_told_from_one_that_does_not_answer(
    address: str,
) -> None:
    with pytest.raises(ConfigError, match=r"host:port, such as 10\.0\.0\.1:6379") as refused:
        require_access(address, allow_unauthenticated=False)
    assert f"launch.address={address}" in str(refused.value)
    assert ("launch.submit" in str(refused.value)) == address.startswith("http")


def test_where_nothing_answers_as_ray_does_is_said_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        nobody, else_ = ask(
            tmp_path,
            ({"RAY_ADDRESS": f"ray://127.0.0.1:{port}"}, "auto", False),
            ({}, f"ray://127.0.0.1:{web.server_port}", False),
        )
        web.shutdown()
    assert nobody.startswith("ConnectionRefusedError")
    assert f"127.0.0.1:{web.server_port} doesn't answer as Ray does" in else_


def test_a_run_on_this_machine_listens_on_loopback_and_wants_a_token(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    with started(tmp_path, shards, *RAY, "train.num_steps=2000") as process:
        wait_for(reached(tmp_path, 3), "third step")
        own = family_of(process.pid)
        places = listening(own)
        assert len(places) > 8, places  # Ray's servers, and the ranks' own
        assert {address for address, _, _ in places} <= {"127.0.0.1", "::1"}, places
        gcs = next(port for _, port, title in places if "/gcs_server" in title)
        # Ray would take 127.0.0.1 for this machine's address in its network, where nobody listens.
        (refused,) = ask(
            tmp_path, ({}, f"127.0.0.1:{gcs}", False), RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0"
        )
        assert "requires a token, and none is set here" in refused
        # The token can be read by this user alone, and stands in no process's environment.
        raylet = next(pid for pid in own if "/raylet " in title_of(pid))
        environ = environment_of(raylet)
        assert "RAY_AUTH_TOKEN" not in environ
        assert Path(environ["RAY_AUTH_TOKEN_PATH"]).stat().st_mode & 0o777 == 0o600
