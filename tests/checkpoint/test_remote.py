"""Checkpoints are uploaded to a remote folder atomically, and downloaded bit for bit."""

import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from moetrain.checkpoint.folders import Save
from moetrain.checkpoint.manifest import (
    CheckpointError,
    FileEntry,
    Manifest,
    describe_file,
    manifest_text,
    read_manifest,
)
from moetrain.checkpoint.remote.checkpoints import (
    RemoteCheckpoints,
    SupersededError,
    open_remote,
    remote_name,
)
from moetrain.checkpoint.remote.download import fetch_newest
from moetrain.checkpoint.remote.folder import RemoteUnavailableError, Retries, check_url
from moetrain.checkpoint.remote.uploader import Uploader
from moetrain.checks import ConfigError
from tests.support.s3_server import Request, S3Server, s3_server
from tests.support.servers import Fault, file_server
from tests.support.uploading import (
    PROCESSES,
    but_two,
    end_during_upload,
    environment,
    kill,
    upload,
    uploads,
)

_SOON = Retries(timeout_seconds=5.0, num_tries=3, pause_seconds=0.01)
# More than two parts of an upload, and no multiple of them.
_LARGE = 17 * 2**20 + 12_345


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def server(s3: S3Server) -> Iterator[S3Server]:
    """The server with no hook and an empty record; its bucket keeps what other tests wrote."""
    s3.requests.clear()
    try:
        yield s3
    finally:
        s3.hook = None


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("gcsfs", reason="needs the packages of moetrain[remote]")
    module = pytest.importorskip("gcp_storage_emulator.server", reason="needs gcp-storage-emulator")
    import fsspec.config

    server = module.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    try:
        host, port = server._api._httpd.server_address
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{host}:{port}")
        monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        yield "gs://bucket/runs"
    finally:
        server.stop()


@pytest.fixture(params=["file", "s3", "gs"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where checkpoints may go, on each kind of store."""
    if request.param == "file":
        (tmp_path / "disk").mkdir()
        return f"file://{tmp_path}/disk"
    if request.param == "s3":
        request.getfixturevalue("server")
        return f"s3://bucket/{tmp_path.name}"
    return str(request.getfixturevalue("gs"))


@pytest.fixture
def on_disk(tmp_path: Path) -> RemoteCheckpoints:
    (tmp_path / "disk").mkdir()
    return opened(f"file://{tmp_path}/disk")


@pytest.fixture
def on_s3(server: S3Server, tmp_path: Path) -> RemoteCheckpoints:
    return opened(f"s3://bucket/{tmp_path.name}")


def opened(address: str, retries: Retries = _SOON) -> RemoteCheckpoints:
    return open_remote(address, run="toy", retries=retries)


def save(
    directory: Path, step: int, *, attempt: int = 1, num_bytes: int = 3000, num_files: int = 3
) -> Path:
    """A checkpoint as it lies on the disk of a run: files of its own bytes, and their hashes."""
    folder = directory / f"step_{step:08d}"
    folder.mkdir(parents=True)
    for number in range(num_files):
        content = random.Random(f"{step} {attempt} {number}").randbytes(num_bytes)
        (folder / f"rank_{number:05d}.safetensors").write_bytes(content)
    found = {path.name: describe_file(path) for path in folder.iterdir()}
    write_manifest(folder, step=step, attempt=attempt, files=found)
    return folder


def write_manifest(folder: Path, *, step: int, attempt: int, files: dict[str, FileEntry]) -> None:
    manifest = Manifest(step=step, attempt=attempt, state={}, config={}, tensors={}, files=files)
    (folder / "manifest.json").write_text(manifest_text(manifest))


def fetch(
    remote: RemoteCheckpoints,
    directory: Path,
    *,
    newer_than: Save | None = None,
    rejected: dict[str, str] | None = None,
) -> Path | None:
    """What is fetched; nothing may be passed over, but where `rejected` takes it."""

    def reject(name: str, reason: str) -> None:
        assert rejected is not None, f"{name}: {reason}"
        rejected[name.rpartition("/")[2]] = reason

    return fetch_newest(remote, directory, newer_than=newer_than, rejected=reject)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def latest(remote: RemoteCheckpoints) -> str:
    return remote.files.read("latest").decode()


def path_of(remote: RemoteCheckpoints) -> Path:
    """The folder behind a `file://` address."""
    return Path(remote.location.removeprefix("file://"))


# Addresses


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("runs/copies", "must begin with one of s3://, gs://, file://.*run.dir"),
        ("gcs://bucket", r"did you mean 'gs'\?"),
        ("http://host/runs", "must begin with one of s3://"),
        ("pipe:cat x", "chained"),
        ("simplecache::s3://bucket/runs", "chained"),
        ("s3://user:hunter2@bucket/runs", "no user, password or signature"),
        ("s3://bucket/runs?X-Amz-Signature=hunter2", "no user, password or signature"),
        ("s3:///runs", "the bucket is missing"),
        ("s3://bucket/../other", "'..'"),
        ("s3://bucket//runs", "an empty name"),
        ("s3://bucket/runs*", r"may not have \*"),
        ("file://runs", "absolute path"),
        ("file://host/runs", "absolute path"),
    ],
)
def test_address_that_cannot_be_is_refused_and_no_secret_is_shown(url: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"checkpoint\.upload_to=.*{reason}") as caught:
        check_url(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/a/b/", "gs://b/c", "file:///mnt/b c"])
def test_address_that_can_be_is_taken(url: str) -> None:
    check_url(url)


def test_missing_library_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("fsspec", reason="needs moetrain[remote]")
    import sys

    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(ConfigError, match=r"s3fs.*pip install 'moetrain\[remote\]'"):
        opened("s3://bucket/runs")


# There and back


def test_checkpoint_comes_back_bit_for_bit_on_another_machine(address: str, tmp_path: Path) -> None:
    remote = opened(address)
    assert fetch(remote, tmp_path / "empty") is None
    assert remote.take_attempt(0) == 1
    first = save(tmp_path / "here", 100)
    second = save(tmp_path / "here", 200, num_bytes=_LARGE, num_files=1)
    assert upload(remote, first) == sum(len(content) for content in contents(first).values())
    assert latest(remote) == "step_00000100_attempt_1"
    upload(remote, second)
    assert latest(remote) == "step_00000200_attempt_1"
    fetched = fetch(opened(address), tmp_path / "there")
    assert fetched == tmp_path / "there" / "step_00000200"
    assert contents(fetched) == contents(second)
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["step_00000200"]
    assert fetch(remote, tmp_path / "there", newer_than=Save(200, 1)) is None
    # A second time nothing is uploaded, and existing files aren't written.
    assert upload(remote, second) == 0
    assert remote.delete_old(lambda saves: saves, owner=1) == ["step_00000100_attempt_1"]
    assert remote.list_complete() == [Save(200, 1)]
    assert remote.take_attempt(0) == 2
    assert remote.take_attempt(7) == 8
    with pytest.raises(SupersededError, match="attempt 8 has taken the run over"):
        upload(remote, save(tmp_path / "here", 300))


def test_the_order_of_an_upload_is_files_then_manifest_then_latest(
    on_s3: RemoteCheckpoints, server: S3Server, tmp_path: Path
) -> None:
    upload(on_s3, save(tmp_path / "here", 100))
    written = [r.path.rpartition("checkpoints/")[2] for r in server.requests if r.writes]
    folder = "step_00000100_attempt_1"
    assert written[-2:] == [f"{folder}/manifest.json", "latest"]
    assert sorted(written[:-2]) == [f"{folder}/rank_{n:05d}.safetensors" for n in range(3)]


def test_another_checkpoint_of_the_same_name_is_never_written_over(
    on_disk: RemoteCheckpoints, tmp_path: Path
) -> None:
    upload(on_disk, save(tmp_path / "here", 100))
    before = contents(path_of(on_disk) / "step_00000100_attempt_1")
    other = save(tmp_path / "other", 100)
    write_manifest(other, step=100, attempt=1, files={})
    with pytest.raises(CheckpointError, match=r"holds another checkpoint.*run\.name"):
        upload(on_disk, other)
    assert contents(path_of(on_disk) / "step_00000100_attempt_1") == before


def test_file_that_is_not_as_its_manifest_says_is_not_uploaded(
    on_disk: RemoteCheckpoints, tmp_path: Path
) -> None:
    folder = save(tmp_path / "here", 100)
    os.truncate(folder / "rank_00001.safetensors", 2999)
    with pytest.raises(CheckpointError, match=r"rank_00001\.safetensors has 2999 bytes"):
        upload(on_disk, folder)
    (folder / "rank_00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank_00001\.safetensors is missing"):
        upload(on_disk, folder)
    assert not on_disk.list_folders()


# Attempts


@pytest.mark.parametrize("store", ["on_disk", "on_s3"])
def test_two_that_start_at_once_get_two_numbers(store: str, request: pytest.FixtureRequest) -> None:
    remote: RemoteCheckpoints = request.getfixturevalue(store)
    start, taken = threading.Barrier(6), list[int]()

    def take() -> None:
        start.wait()
        taken.append(remote.take_attempt(0))

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(taken)) == 6
    assert remote.newest_attempt() == max(taken)


@pytest.mark.parametrize(("status", "code"), [(501, "NotImplemented"), (400, "InvalidArgument")])
def test_store_that_knows_no_exclusive_creation_is_asked_before_it_is_written_to(
    status: int, code: str, on_s3: RemoteCheckpoints, server: S3Server, tmp_path: Path
) -> None:
    server.hook = lambda request: (status, code) if request.exclusive else None
    assert on_s3.take_attempt(0) == 1
    assert on_s3.take_attempt(0) == 2
    assert not on_s3.files.create("attempts/00000002", b"again")
    assert on_s3.files.read("attempts/00000002") == b"2\n"


def test_attempt_that_is_taken_over_during_its_upload_commits_nothing(
    on_s3: RemoteCheckpoints, server: S3Server, tmp_path: Path
) -> None:
    upload(on_s3, save(tmp_path / "here", 100))
    client = s3_without_hook(server)

    def take_over(request: Request) -> None:
        if "step_00000200_attempt_1" in request.path and request.method == "PUT":
            client.put(f"{tmp_path.name}/toy/checkpoints/attempts/00000002", b"2\n")

    server.hook = take_over
    with pytest.raises(SupersededError, match="attempt 2 has taken the run over"):
        upload(on_s3, save(tmp_path / "here", 200))
    assert latest(on_s3) == "step_00000100_attempt_1"
    assert on_s3.list_complete() == [Save(100, 1)]
    # Nor may it delete checkpoints that the newer one may need.
    with pytest.raises(SupersededError):
        on_s3.delete_old(lambda saves: saves, owner=1)


def test_latest_that_an_old_attempt_wrote_too_late_names_the_new_ones_again(
    on_s3: RemoteCheckpoints, server: S3Server, tmp_path: Path
) -> None:
    root = f"{tmp_path.name}/toy/checkpoints"
    client = s3_without_hook(server)
    new = save(tmp_path / "new", 150, attempt=2)

    def overtake(request: Request) -> None:
        """The new attempt does all its work between the old one's last check and its write."""
        if request.path.endswith("/latest") and request.method == "PUT":
            server.hook = None
            client.put(f"{root}/attempts/00000002", b"2\n")
            for name, content in contents(new).items():
                client.put(f"{root}/step_00000150_attempt_2/{name}", content)
            client.put(f"{root}/latest", b"step_00000150_attempt_2")

    server.hook = overtake
    with pytest.raises(SupersededError):
        upload(on_s3, save(tmp_path / "old", 200))
    assert latest(on_s3) == "step_00000150_attempt_2"
    # What the old one saved is whole, and comes after what the new one saved.
    assert fetch(on_s3, tmp_path / "there") == tmp_path / "there" / "step_00000150"


class s3_without_hook:
    """Writes objects into moto's memory, from inside of a request."""

    def __init__(self, server: S3Server) -> None:
        from moto.s3.models import s3_backends

        self._backend = s3_backends["123456789012"]["aws"]

    def put(self, key: str, content: bytes) -> None:
        self._backend.put_object("bucket", key, content)


# Deletion


def test_only_what_is_kept_and_the_newest_stay(on_disk: RemoteCheckpoints, tmp_path: Path) -> None:
    for step, attempt in ((100, 1), (200, 1), (300, 1), (150, 2)):
        upload(on_disk, save(tmp_path / str(attempt), step, attempt=attempt))
    asked: list[Save] = []

    def old(saves: Collection[Save]) -> list[Save]:
        asked.extend(saves)
        return [save for save in saves if save != Save(200, 1)]

    deleted = on_disk.delete_old(old, owner=2)
    # In the order in which they would be tried: the run's own line, then those beside it.
    assert asked == [Save(150, 2), Save(100, 1), Save(300, 1), Save(200, 1)]
    assert deleted == ["step_00000100_attempt_1", "step_00000300_attempt_1"]
    assert {path.name for path in path_of(on_disk).iterdir()} == {
        "step_00000150_attempt_2",
        "step_00000200_attempt_1",
        "latest",
    }


def test_leavings_go_but_not_those_of_a_newer_attempt_nor_what_nobody_here_wrote(
    on_disk: RemoteCheckpoints, tmp_path: Path
) -> None:
    upload(on_disk, save(tmp_path / "here", 300, attempt=2))
    root = path_of(on_disk)
    for name in ("step_00000200_attempt_1", "step_00000400_attempt_2", "step_00000400_attempt_3"):
        (root / name).mkdir()
        (root / name / "rank_00000.safetensors").write_bytes(b"half")
    (root / "notes").mkdir()
    (root / "notes" / "read.me").write_text("mine")
    assert on_disk.delete_old(but_two, owner=2) == []
    assert {path.name for path in root.iterdir()} == {
        "step_00000300_attempt_2",
        "step_00000400_attempt_3",
        "notes",
        "latest",
    }


def test_manifest_is_deleted_before_all_else_and_unfinished_parts_after_it(
    on_s3: RemoteCheckpoints, server: S3Server, tmp_path: Path
) -> None:
    for step in (100, 200):
        upload(on_s3, save(tmp_path / "here", step))
    key = f"{tmp_path.name}/toy/checkpoints/step_00000050_attempt_1/rank_00000.safetensors"
    client = server.client()
    client.create_multipart_upload(Bucket="bucket", Key=key)
    client.put_object(Bucket="bucket", Key=key, Body=b"half")
    other = client.create_multipart_upload(Bucket="bucket", Key=f"{tmp_path.name}/toy/other")
    server.requests.clear()
    on_s3.delete_old(lambda saves: saves, owner=1)
    deleted = [r.path for r in server.requests if r.method == "DELETE" and "00000100" in r.path]
    assert deleted[0].endswith("step_00000100_attempt_1/manifest.json")
    assert len(deleted) == 4
    left = client.list_multipart_uploads(Bucket="bucket", Prefix=tmp_path.name)["Uploads"]
    assert [entry["UploadId"] for entry in left] == [other["UploadId"]]


# Servers that fail


@pytest.mark.parametrize("status", [500, 503, 429, 409])
def test_fault_that_passes_is_got_over(status: int, server: S3Server, tmp_path: Path) -> None:
    seen = dict[tuple[str, str, str], int]()

    def fail_first(request: Request) -> int | None:
        key = (request.method, request.path, request.query.partition("uploadId")[0])
        seen[key] = seen.get(key, 0) + 1
        return status if seen[key] == 1 else None

    server.hook = fail_first
    folder = save(tmp_path / "here", 100)
    # A listing alone may take three requests.
    on_s3 = opened(f"s3://bucket/{tmp_path.name}", Retries(num_tries=4, pause_seconds=0.01))
    assert on_s3.take_attempt(0) == 1
    upload(on_s3, folder)
    fetched = fetch(on_s3, tmp_path / "there")
    assert fetched is not None
    assert contents(fetched) == contents(folder)
    assert sum(number > 1 for number in seen.values()) > 8


def test_lost_answer_to_the_commit_is_no_failure(
    on_s3: RemoteCheckpoints, server: S3Server, tmp_path: Path
) -> None:
    client, lost = s3_without_hook(server), list[Request]()

    def lose(request: Request) -> int | None:
        if request.path.endswith("manifest.json") and request.method == "PUT" and not lost:
            lost.append(request)
            client.put(request.path.removeprefix("bucket/"), request.body)
            return 500
        return None

    server.hook = lose
    upload(on_s3, save(tmp_path / "here", 100))
    assert lost
    assert latest(on_s3) == "step_00000100_attempt_1"


def test_object_that_the_server_lost_part_of_is_found_before_the_commit(
    on_s3: RemoteCheckpoints, server: S3Server, tmp_path: Path
) -> None:
    client = s3_without_hook(server)

    def shorten(request: Request) -> None:
        if request.method == "GET" and "list-type" in request.query:
            key = f"{tmp_path.name}/toy/checkpoints/step_00000100_attempt_1/rank_00002.safetensors"
            client.put(key, b"short")

    folder = save(tmp_path / "here", 100)
    server.hook = shorten
    with pytest.raises(RemoteUnavailableError, match=r"rank_00002.* has 5 bytes after its upload"):
        upload(on_s3, folder)
    assert on_s3.list_complete() == []


@pytest.mark.parametrize(
    ("status", "num_requests", "message"),
    [
        (500, 3, r"tried 3 times: .*see to the network or the server"),
        (403, 1, r"check the credentials, and that they allow to list, read, write and delete"),
    ],
)
def test_fault_that_stays_is_told_with_the_address_and_the_way_out(
    status: int, num_requests: int, message: str, on_s3: RemoteCheckpoints, server: S3Server
) -> None:
    server.hook = lambda request: status
    with pytest.raises(RemoteUnavailableError, match=rf"s3://bucket/.*{message}"):
        on_s3.take_attempt(0)
    assert len(server.requests) == num_requests


def test_missing_bucket_and_missing_disk_are_said(server: S3Server, tmp_path: Path) -> None:
    with pytest.raises(RemoteUnavailableError, match=r"s3://nobucket/x.*does not exist; create"):
        opened("s3://nobucket/x").take_attempt(0)
    with pytest.raises(RemoteUnavailableError, match=r"disk is no folder.*mount or make it"):
        opened(f"file://{tmp_path}/disk").take_attempt(0)


def test_unreachable_server_and_missing_credentials_are_said(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        few = Retries(timeout_seconds=5.0, num_tries=1)
        with pytest.raises(RemoteUnavailableError, match=r"Could not connect|nothing came"):
            opened("s3://bucket/x", few).take_attempt(0)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(RemoteUnavailableError, match=r"NoCredentialsError.*credentials"):
        opened("s3://bucket/x").take_attempt(0)


def test_server_that_says_nothing_is_given_up_in_time(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with file_server() as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{silent.address}")
        silent.files["/bucket"] = b""
        silent.next_fault = lambda path: Fault.SILENT
        remote = opened("s3://bucket/x", Retries(timeout_seconds=0.5, num_tries=2))
        with pytest.raises(RemoteUnavailableError, match=r"tried 2 times: nothing came for 0\.5 s"):
            remote.take_attempt(0)


# What is damaged or hostile


def flip(folder: Path) -> None:
    content = bytearray((folder / "rank_00001.safetensors").read_bytes())
    content[1500] ^= 8
    (folder / "rank_00001.safetensors").write_bytes(content)


def list_file(folder: Path, name: str) -> None:
    entry = FileEntry(size=4, xxh3_128=xxhash.xxh3_128_hexdigest(b"evil"))
    files = {**read_manifest(folder).files, name: entry}
    write_manifest(folder, step=200, attempt=1, files=files)
    if name not in ("", "manifest.json") and name[0] != "/":  # what is listed is there, too
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"evil")


def renumber(folder: Path) -> None:
    write_manifest(folder, step=100, attempt=1, files=read_manifest(folder).files)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip, "rank_00001.safetensors does not have the hash"),
        (lambda f: os.truncate(f / "rank_00001.safetensors", 7), "rank_00001.*has 7 bytes"),
        (lambda f: (f / "rank_00001.safetensors").unlink(), "rank_00001.*is missing"),
        (lambda f: os.truncate(f / "manifest.json", 40), "can't be read"),
        (lambda f: os.truncate(f / "manifest.json", 0), "can't be read"),
        (lambda f: (f / "manifest.json").write_text("[1]"), "can't be read"),
        (lambda f: os.truncate(f / "manifest.json", 2**30 + 1), "which no manifest has"),
        (renumber, "is that of step 100"),
        (lambda f: list_file(f, "../evil"), r"lists '\.\./evil'"),
        (lambda f: list_file(f, f"{f.parents[3]}/evil"), "lists '/.*evil'"),
        (lambda f: list_file(f, "a/evil"), "lists 'a/evil'"),
        (lambda f: list_file(f, ".evil"), r"lists '\.evil'"),
        (lambda f: list_file(f, "manifest.json"), "lists 'manifest.json'"),
        (lambda f: list_file(f, ""), "lists ''"),
    ],
)
def test_damaged_checkpoint_is_passed_over_for_the_one_before(
    damage: Any, reason: str, on_disk: RemoteCheckpoints, tmp_path: Path
) -> None:
    good = save(tmp_path / "here", 100)
    upload(on_disk, good)
    upload(on_disk, save(tmp_path / "here", 200))
    damage(path_of(on_disk) / "step_00000200_attempt_1")
    rejected = dict[str, str]()
    fetched = fetch(on_disk, tmp_path / "there", rejected=rejected)
    assert fetched is not None
    assert contents(fetched) == contents(good)
    assert list(rejected) == ["step_00000200_attempt_1"]
    assert re.search(reason, rejected["step_00000200_attempt_1"])
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["step_00000100"]
    assert not (tmp_path / "evil").exists()


def test_flipped_bit_and_short_object_on_s3_are_passed_over(
    on_s3: RemoteCheckpoints, server: S3Server, tmp_path: Path
) -> None:
    good = save(tmp_path / "here", 100)
    for folder in (good, *(save(tmp_path / "here", step) for step in (200, 300))):
        upload(on_s3, folder)
    client, root = s3_without_hook(server), f"{tmp_path.name}/toy/checkpoints"
    content = contents(tmp_path / "here" / "step_00000200")["rank_00001.safetensors"]
    client.put(f"{root}/step_00000200_attempt_1/rank_00001.safetensors", content[:-1] + b"\x00")
    client.put(f"{root}/step_00000300_attempt_1/rank_00000.safetensors", content[:-1])
    rejected = dict[str, str]()
    fetched = fetch(on_s3, tmp_path / "there", rejected=rejected)
    assert fetched is not None
    assert contents(fetched) == contents(good)
    assert list(rejected) == ["step_00000300_attempt_1", "step_00000200_attempt_1"]


def test_names_that_are_no_checkpoint_are_not_listed(on_disk: RemoteCheckpoints) -> None:
    for name in (
        "step_1_attempt_1",
        "step_000000100_attempt_1",
        "step_00000100_attempt_01",
        "step_00000100",
        "x_step_00000100_attempt_1",
        "step_00000100_attempt_1.tmp",
    ):
        folder = path_of(on_disk) / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    assert on_disk.list_folders() == {}


def test_unreachable_server_is_not_taken_for_a_folder_without_checkpoints(
    on_s3: RemoteCheckpoints, server: S3Server, tmp_path: Path
) -> None:
    upload(on_s3, save(tmp_path / "here", 100))
    server.hook = lambda request: 500 if "rank_00001" in request.path else None
    with pytest.raises(RemoteUnavailableError, match=r"rank_00001.*tried 3 times"):
        fetch(on_s3, tmp_path / "there")
    assert not (tmp_path / "there" / "step_00000100").exists()


# Downloads that were cut short


def test_download_goes_on_where_it_was_cut(
    on_s3: RemoteCheckpoints, server: S3Server, tmp_path: Path
) -> None:
    folder = save(tmp_path / "here", 100, num_bytes=_LARGE, num_files=1)
    upload(on_s3, folder)
    server.hook = lambda request: 500 if piece_of(request) == 2 else None
    with pytest.raises(RemoteUnavailableError):
        fetch(on_s3, tmp_path / "there")
    server.hook = None
    server.requests.clear()
    fetched = fetch(on_s3, tmp_path / "there")
    assert fetched is not None
    assert contents(fetched) == contents(folder)
    # The last piece alone: two of 8 MiB had come.
    assert len([r for r in server.requests if "rank_00000" in r.path]) == 1


_seen_pieces: dict[str, int] = {}


def piece_of(request: Request) -> int:
    """Which piece of a file's download a request asks for, counted from 0."""
    if request.method != "GET" or "rank_00000" not in request.path:
        return -1
    _seen_pieces[request.path] = _seen_pieces.get(request.path, -1) + 1
    return min(_seen_pieces[request.path], 2)


def test_damaged_part_of_an_earlier_download_is_begun_anew(
    on_disk: RemoteCheckpoints, tmp_path: Path
) -> None:
    folder = save(tmp_path / "here", 100)
    upload(on_disk, folder)
    staged = tmp_path / "there" / "staged_download_00000100_attempt_1"
    stale = tmp_path / "there" / "staged_download_00000050_attempt_1"
    shutil.copytree(folder, staged)
    stale.mkdir()
    flip(staged)
    (staged / "rank_00002.safetensors").write_bytes(bytes(5000))
    fetched = fetch(on_disk, tmp_path / "there")
    assert fetched is not None
    assert contents(fetched) == contents(folder)
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["step_00000100"]


def test_local_checkpoint_of_the_same_step_moves_aside_unless_it_is_the_same(
    on_disk: RemoteCheckpoints, tmp_path: Path
) -> None:
    new = save(tmp_path / "new", 100, attempt=2)
    upload(on_disk, new)
    there = tmp_path / "there"
    old = contents(save(there, 100))
    assert fetch(on_disk, there, newer_than=Save(100, 1)) == there / "step_00000100"
    assert contents(there / "step_00000100") == contents(new)
    assert contents(there / "replaced_step_00000100_attempt_2") == old
    # Killed after the rename and asked again, it finds the one that is there.
    inode = (there / "step_00000100").stat().st_ino
    assert fetch(on_disk, there, newer_than=Save(100, 1)) == there / "step_00000100"
    assert (there / "step_00000100").stat().st_ino == inode
    flip(there / "step_00000100")
    assert fetch(on_disk, there) == there / "step_00000100"
    assert contents(there / "step_00000100") == contents(new)


def test_a_step_of_a_newer_attempt_is_newer_than_a_later_step_of_an_older(
    on_disk: RemoteCheckpoints, tmp_path: Path
) -> None:
    for step, attempt in ((200, 1), (150, 2)):
        upload(on_disk, save(tmp_path / str(attempt), step, attempt=attempt), owner=2)
    assert latest(on_disk) == "step_00000150_attempt_2"
    assert fetch(on_disk, tmp_path / "a") == tmp_path / "a" / "step_00000150"
    assert (
        fetch(on_disk, tmp_path / "b", newer_than=Save(200, 1)) == tmp_path / "b" / "step_00000150"
    )
    # A late upload of what an older attempt saved doesn't move `latest` back.
    upload(on_disk, save(tmp_path / "1", 180), owner=2)
    assert latest(on_disk) == "step_00000150_attempt_2"


def test_too_little_room_is_said_before_anything_is_downloaded(
    on_disk: RemoteCheckpoints, tmp_path: Path
) -> None:
    folder = path_of(on_disk) / "step_00000100_attempt_1"
    folder.mkdir(parents=True)
    (folder / "huge").touch()
    size = shutil.disk_usage(tmp_path).free + 2**30
    os.truncate(folder / "huge", size)
    huge = {"huge": FileEntry(size=size, xxh3_128="")}
    write_manifest(folder, step=100, attempt=1, files=huge)
    with pytest.raises(
        CheckpointError, match=r"to .*there: .*No space left: .* are needed.* run\.dir"
    ):
        fetch(on_disk, tmp_path / "there")


# Killed


def require_whole(remote: RemoteCheckpoints, sources: Path, there: Path) -> int:
    """All that counts as a checkpoint is one, bit for bit; returns the newest's step."""
    complete = remote.list_complete()
    assert len(complete) >= 2
    assert latest(remote) in {remote_name(save) for save in complete}
    for each in complete:
        for name, content in contents(sources / f"step_{each.step:08d}").items():
            assert remote.files.read(f"{remote_name(each)}/{name}") == content
    shutil.rmtree(there, ignore_errors=True)
    fetched = fetch(remote, there)
    assert fetched is not None
    assert contents(fetched) == contents(sources / f"step_{complete[0].step:08d}")
    return complete[0].step


def test_kills_at_any_moment_of_an_upload_to_s3_leave_whole_checkpoints(
    on_s3: RemoteCheckpoints, server: S3Server, tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    drawn = random.Random(seed)
    here, there = tmp_path / "here", tmp_path / "there"
    for step in (100, 200):
        upload(on_s3, save(here, step, num_files=2))

    def nth(number: int, *methods: str, part: str = "") -> Callable[[Request], bool]:
        """Whether this is the request of that number among those of a kind."""
        counted = itertools.count(1)
        return lambda r: r.method in methods and part in r.path and next(counted) == number

    writes = ("PUT", "POST", "DELETE")
    # Each with whether the new checkpoint must, or can't, count after a kill before that request.
    moments: list[tuple[Callable[[Request], bool], bool | None]] = [
        (nth(drawn.randint(1, 5), *writes, part="rank_"), False),  # a file of three parts
        (nth(1, "PUT", part="manifest.json"), False),
        (nth(1, "PUT", part="latest"), True),
        (nth(1, "DELETE", part="manifest.json"), True),
        (nth(1, "DELETE", part="rank_"), True),
        (nth(drawn.randint(2, 5), "DELETE"), True),
        *((nth(drawn.randint(1, 25), "GET", "HEAD", *writes), None) for _ in range(2)),
    ]
    with uploads() as processes:
        for number, (moment, counts) in enumerate(moments):
            step = 300 + 100 * number
            size, num_files = (3000, 2) if number else (_LARGE, 1)
            folder = save(here, step, num_bytes=size, num_files=num_files)

            def arm(process: int, moment: Callable[[Request], bool] = moment) -> None:
                def strike(request: Request) -> int | None:
                    if not moment(request):
                        return None
                    kill(process)
                    return 500

                server.hook = strike

            # Armed before its first request: it waits for its number to be taken.
            code = processes.run(f"s3://bucket/{tmp_path.name}", folder, meanwhile=arm)
            server.hook = None
            newest = require_whole(on_s3, here, there)
            if counts is not None:
                assert code == -signal.SIGKILL
                assert (newest == step) == counts
        # And the next upload isn't hindered.
        upload(on_s3, save(here, 9000))
        on_s3.delete_old(but_two, owner=1)
    assert latest(on_s3) == "step_00009000_attempt_1"
    assert len(on_s3.list_folders()) == 2


def test_kills_at_random_moments_of_an_upload_to_a_disk_leave_whole_checkpoints(
    on_disk: RemoteCheckpoints, tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    drawn = random.Random(seed)
    here, there = tmp_path / "here", tmp_path / "there"
    for step in (100, 200):
        upload(on_disk, save(here, step))
    address, seconds, codes = f"file://{tmp_path}/disk", 0.0, []
    with uploads() as processes:
        for number in range(24):
            folder = save(here, 300 + 100 * number, num_bytes=100_000, num_files=4)

            def strike(process: int, number: int = number, whole: float = seconds) -> None:
                if number >= 3:  # the first ones are timed
                    time.sleep(drawn.uniform(0.0, 1.1 * whole))
                    with contextlib.suppress(ProcessLookupError):
                        kill(process)

            began = time.monotonic()
            codes.append(processes.run(address, folder, meanwhile=strike))
            seconds = time.monotonic() - began if number < 3 else seconds
            require_whole(on_disk, here, there)
    assert codes[:3] == [0, 0, 0]
    assert set(codes[3:]) <= {0, -signal.SIGKILL}
    assert codes.count(-signal.SIGKILL) >= 5
    upload(on_disk, save(here, 9000))
    on_disk.delete_old(but_two, owner=1)
    # Nothing of the killed ones is left, except empty folders.
    left = {path.parent.name for path in path_of(on_disk).glob("step_*/*")}
    assert left == {remote_name(save) for save in on_disk.list_complete()}
    assert len(on_disk.list_complete()) == 2


# Asynchronous uploads


class Events:
    """The events that an uploader reported."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []
        self._came = threading.Condition()

    def __call__(self, kind: str, **fields: Any) -> None:
        with self._came:
            self.told.append((kind, fields))
            self._came.notify_all()

    def steps(self, kind: str) -> list[int]:
        return [fields["step"] for name, fields in self.told if name == kind]

    def wait_for(self, kind: str, number: int = 1) -> None:
        with self._came:
            assert self._came.wait_for(lambda: len(self.steps(kind)) >= number, 30), self.told


def submit(uploader: Uploader, folder: Path) -> None:
    uploader.submit(folder, read_manifest(folder))


def started(remote: RemoteCheckpoints, events: Any, **settings: Any) -> Uploader:
    return Uploader(remote, owner=1, old=but_two, event=events, **settings)


def test_newest_is_uploaded_next_and_those_in_between_are_left_out(
    on_s3: RemoteCheckpoints, server: S3Server, tmp_path: Path
) -> None:
    events, going, go_on = Events(), threading.Event(), threading.Event()

    def wait(request: Request) -> None:
        if request.method == "PUT" and "step_00000100" in request.path:
            going.set()
            go_on.wait(30)

    server.hook = wait
    uploader = started(on_s3, events)
    assert uploader.busy() == set()
    submit(uploader, save(tmp_path / "here", 100))
    assert going.wait(30)
    submit(uploader, save(tmp_path / "here", 200))
    submit(uploader, save(tmp_path / "here", 300))
    assert uploader.busy() == {"step_00000100", "step_00000300"}
    assert events.told == [("upload_skipped", {"step": 200, "reason": "step 300 is newer"})]
    go_on.set()
    assert uploader.close() is None
    assert uploader.busy() == set()
    assert events.steps("upload") == [100, 300]
    (_, first), *_ = (event for event in events.told if event[0] == "upload")
    num_bytes = sum(map(len, contents(tmp_path / "here" / "step_00000100").values()))
    assert first["bytes"] == num_bytes
    assert first["seconds"] > 0
    assert latest(on_s3) == "step_00000300_attempt_1"


def test_old_ones_are_deleted_after_an_upload(on_disk: RemoteCheckpoints, tmp_path: Path) -> None:
    events = Events()
    uploader = started(on_disk, events)
    for number, step in enumerate((100, 200, 300), start=1):
        submit(uploader, save(tmp_path / "here", step))
        events.wait_for("upload", number)
    assert uploader.close() is None
    assert ("remote_deleted", {"checkpoints": ["step_00000100_attempt_1"]}) in events.told
    assert [each.step for each in on_disk.list_complete()] == [300, 200]


def test_failed_upload_is_told_and_the_next_one_is_tried(
    on_disk: RemoteCheckpoints, tmp_path: Path
) -> None:
    events = Events()
    uploader = started(on_disk, events)
    bad = save(tmp_path / "here", 100)
    os.truncate(bad / "rank_00000.safetensors", 5)
    submit(uploader, bad)
    events.wait_for("upload_failed")
    assert "has 5 bytes" in events.told[0][1]["reason"]
    submit(uploader, save(tmp_path / "here", 200))
    assert uploader.close() is None
    assert events.steps("upload") == [200]


def test_outage_is_waited_out_and_the_same_checkpoint_goes_up_after_it(
    on_s3: RemoteCheckpoints, server: S3Server, tmp_path: Path
) -> None:
    events = Events()
    server.hook = lambda request: 503
    uploader = started(on_s3, events, retry_seconds=0.05)
    folder = save(tmp_path / "here", 100)
    submit(uploader, folder)
    events.wait_for("upload_failed", 2)
    assert uploader.busy() == {"step_00000100"}
    server.hook = None
    events.wait_for("upload")
    assert uploader.close() is None
    assert on_s3.list_complete() == [Save(100, 1)]


def test_close_says_why_the_last_one_is_not_there(
    on_s3: RemoteCheckpoints, server: S3Server, tmp_path: Path
) -> None:
    uploader = started(on_s3, Events())
    server.hook = lambda request: 503
    submit(uploader, save(tmp_path / "here", 100))
    reason = uploader.close()
    assert reason is not None
    assert "can't be used, tried 3 times" in reason
    with pytest.raises(RuntimeError, match="closed"):
        submit(uploader, tmp_path / "here" / "step_00000100")


def test_close_gives_a_server_that_stalls_up_after_its_time(
    server: S3Server, tmp_path: Path
) -> None:
    # Retries that outlast the test: what ends the upload is the close.
    remote = opened(f"s3://bucket/{tmp_path.name}", Retries(timeout_seconds=60.0))
    going, go_on = threading.Event(), threading.Event()

    def stall(request: Request) -> None:
        if request.method == "PUT":
            going.set()
            go_on.wait(100)

    server.hook = stall
    uploader = started(remote, Events())
    submit(uploader, save(tmp_path / "here", 100))
    assert going.wait(30)
    began = time.monotonic()
    reason = uploader.close(timeout=0.2)
    assert time.monotonic() - began < 20
    assert reason is not None
    assert "still being uploaded after 0.2 s" in reason
    assert not uploader._thread.is_alive()
    go_on.set()


def test_newer_checkpoint_does_not_wait_for_the_end_of_an_outage(
    on_s3: RemoteCheckpoints, server: S3Server, tmp_path: Path
) -> None:
    events = Events()
    server.hook = lambda request: 503
    uploader = started(on_s3, events, retry_seconds=3600.0)
    submit(uploader, save(tmp_path / "here", 100))
    events.wait_for("upload_failed")
    server.hook = None
    submit(uploader, save(tmp_path / "here", 200))
    events.wait_for("upload")
    assert events.steps("upload_skipped") == [100]
    assert uploader.close() is None


def test_close_tries_at_once_what_waits_for_the_end_of_an_outage(
    on_s3: RemoteCheckpoints, server: S3Server, tmp_path: Path
) -> None:
    events = Events()
    server.hook = lambda request: 503
    uploader = started(on_s3, events, retry_seconds=3600.0)
    submit(uploader, save(tmp_path / "here", 100))
    events.wait_for("upload_failed")
    server.hook = None
    assert uploader.close(timeout=30) is None
    assert events.steps("upload") == [100]


def test_event_that_cannot_be_written_does_not_end_the_uploads(
    on_disk: RemoteCheckpoints, tmp_path: Path
) -> None:
    events = Events()

    def fail(kind: str, **fields: Any) -> None:
        events(kind, **fields)
        raise OSError("no space left")

    uploader = started(on_disk, fail)
    for number, step in enumerate((100, 200), start=1):
        submit(uploader, save(tmp_path / "here", step))
        events.wait_for("upload", number)
    assert uploader.close() is None
    assert latest(on_disk) == "step_00000200_attempt_1"


def test_program_that_ends_does_not_wait_for_an_upload(server: S3Server, tmp_path: Path) -> None:
    began, go_on = PROCESSES.Event(), threading.Event()

    def stall(request: Request) -> None:
        if request.method == "PUT":
            began.set()
            go_on.wait(100)

    server.hook = stall
    folder, address = save(tmp_path / "here", 100), f"s3://bucket/{tmp_path.name}"
    child = PROCESSES.Process(
        target=end_during_upload, args=(address, folder, environment(), began)
    )
    child.start()
    child.join(50)
    try:
        assert child.exitcode == 0
    finally:
        go_on.set()
        child.kill()
        child.join()
