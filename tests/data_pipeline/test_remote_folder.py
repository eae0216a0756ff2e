"""Folders at s3://, gs:// and https:// are read through the libraries and servers of others."""

import hashlib
import http.client
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline import DataError, DataSettings, GlobalBatches, ShardFolder
from data_pipeline.settings import CacheSettings
from data_pipeline.storage import RemoteFiles, open_files
from tests.data_pipeline.numbered import write_numbered
from tests.support.servers import Fault, file_server

# More than one of the pieces that are asked for at a time, and no multiple of them.
_BODY = os.urandom(1000) * 9001

# For what libraries look at only when they are imported: environment variables.
READ_INDEX = """
from data_pipeline.settings import CacheSettings
from data_pipeline.storage import open_files

files = open_files({folder!r}, cache=CacheSettings(dir={directory!r}))
assert files.read_bytes("index.json") == b"{{}}"
"""


def remote(folder: str, tmp_path: Path, *, timeout_seconds: float = 60.0) -> RemoteFiles:
    cache = CacheSettings(
        dir=str(tmp_path / "cache"),
        timeout_seconds=timeout_seconds,
        num_retries=1,
        pause_seconds=0.01,
    )
    files = open_files(folder, cache=cache)
    assert isinstance(files, RemoteFiles)
    return files


def read(files: RemoteFiles, name: str, body: bytes = _BODY) -> bytes:
    with files.open(name, size=len(body), sha256=hashlib.sha256(body).hexdigest()) as file:
        return file.read()


def check_folder(folder: str, tmp_path: Path) -> None:
    """A folder with `index.json` and `a.tar` is read, and errors are what they should be."""
    files = remote(folder, tmp_path)
    assert files.read_bytes("index.json") == b"{}"
    assert read(files, "a.tar") == _BODY
    with pytest.raises(FileNotFoundError):
        files.read_bytes("other.json")
    with pytest.raises(DataError, match=f"{folder}/b.tar is missing"):
        read(files, "b.tar", b"other")
    with pytest.raises(DataError, match=rf"{folder}/a.tar .*SHA-256 is .* and should be"):
        read(files, "a.tar", _BODY[:-1] + b"x")
    with pytest.raises(DataError, match=rf"{folder}/a.tar .*{len(_BODY)} bytes were sent and"):
        read(files, "a.tar", _BODY + b"x")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("s3fs", reason="needs the packages of moetrain[remote]")
    server_module = pytest.importorskip("moto.server", reason="needs moto and flask")
    import boto3

    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        address, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}:{port}")
        client = boto3.client("s3")
        client.create_bucket(Bucket="corpus")
        client.put_object(Bucket="corpus", Key="text/index.json", Body=b"{}")
        client.put_object(Bucket="corpus", Key="text/a.tar", Body=_BODY)
        yield "s3://corpus/text"
    finally:
        server.stop()


def test_s3_folder_is_read_from_a_server_of_s3(s3: str, tmp_path: Path) -> None:
    check_folder(s3, tmp_path)


def test_s3_without_credentials_says_so_at_once(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DataError, match=r"can't be read: NoCredentialsError.*credentials"):
        remote(s3, tmp_path).read_bytes("index.json")


def test_server_of_s3_is_found_by_the_settings_of_fsspec(s3: str, tmp_path: Path) -> None:
    environment = dict(os.environ)
    environment["FSSPEC_S3_ENDPOINT_URL"] = environment.pop("AWS_ENDPOINT_URL")
    program = READ_INDEX.format(folder=s3, directory=str(tmp_path))
    subprocess.run([sys.executable, "-c", program], env=environment, timeout=60, check=True)


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("gcsfs", reason="needs the packages of moetrain[remote]")
    module = pytest.importorskip("gcp_storage_emulator.server", reason="needs gcp-storage-emulator")
    import fsspec.config

    server = module.create_server("127.0.0.1", 0, in_memory=True, default_bucket="corpus")
    server.start()
    try:
        host, port = server._api._httpd.server_address
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{host}:{port}")
        monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        for name, body in (("index.json", b"{}"), ("a.tar", _BODY)):
            connection = http.client.HTTPConnection(host, port)
            path = f"/upload/storage/v1/b/corpus/o?uploadType=media&name=text%2F{name}"
            connection.request("POST", path, body)
            assert connection.getresponse().status == 200
            connection.close()
        yield "gs://corpus/text"
    finally:
        server.stop()


def test_gs_folder_is_read_from_an_emulator_of_google_storage(gs: str, tmp_path: Path) -> None:
    check_folder(gs, tmp_path)


@pytest.mark.parametrize(
    ("folder", "path", "query"),
    [
        ("s3://corpus/text", "/corpus/text/a.tar", ""),
        ("gs://corpus/text", "/download/storage/v1/b/corpus/o/text%2Fa.tar", "?alt=media"),
    ],
)
def test_object_store_that_stalls_is_asked_again_and_then_named(
    folder: str, path: str, query: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("s3fs", reason="needs the packages of moetrain[remote]")
    config = pytest.importorskip("fsspec.config")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setitem(config.conf, "gs", {"token": "anon"})
    with file_server() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server.address}")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{server.address}")
        # It knows no ranges: the whole file is one piece.
        body, files = _BODY[:1000], remote(folder, tmp_path, timeout_seconds=2.0)
        server.files[path] = body
        server.faults[path + query] = [Fault.SILENT, Fault.STOPS_MIDWAY]
        with pytest.raises(DataError, match=f"{folder}/a.tar .*tried 2 times: nothing came for 2"):
            read(files, "a.tar", body)
        assert read(files, "a.tar", body) == body


@pytest.fixture
def https(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a folder, and the file of the certificate authority that vouches for it."""
    trustme = pytest.importorskip("trustme", reason="needs trustme")
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    with file_server(context) as server:
        server.files["/text/index.json"] = b"{}"
        yield f"https://{server.address}/text", tmp_path / "authority.pem"


def test_https_folder_is_read_where_its_certificate_is_trusted(
    https: tuple[str, Path], tmp_path: Path
) -> None:
    folder, authority = https
    program = READ_INDEX.format(folder=folder, directory=str(tmp_path))
    environment = {**os.environ, "SSL_CERT_FILE": str(authority)}
    subprocess.run([sys.executable, "-c", program], env=environment, timeout=60, check=True)


def test_certificate_that_is_not_trusted_is_said_at_once(
    https: tuple[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"can't be read: .*certificate"):
        remote(https[0], tmp_path).read_bytes("index.json")


def test_remote_folder_gives_the_batches_of_the_local_one_through_a_cache_too_small_for_it(
    tmp_path: Path,
) -> None:
    pytest.importorskip("fsspec.implementations.http", reason="needs moetrain[remote]")
    local = write_numbered(tmp_path / "shards", {"en": [40] * 200, "fr": [25] * 100})
    sizes = [path.stat().st_size for path in local.path.iterdir()]
    cache = CacheSettings(dir=str(tmp_path / "cache"), max_gib=(sum(sizes) // 2) / 2**30)
    assert max(sizes) < sum(sizes) // 2
    with file_server() as server:
        for path in local.path.iterdir():
            server.files[f"/shards/{path.name}"] = path.read_bytes()
        folder = ShardFolder.open(f"http://{server.address}/shards", cache=cache)
        assert folder.fingerprint == local.fingerprint
        batches = [
            GlobalBatches(source, seq_len=32, global_batch_size=64, seed=3, data=DataSettings())
            for source in (local, folder)
        ]
        for step in range(8):
            here, there = (each.read(64 * step, rank=0, num_ranks=1) for each in batches)
            assert (here.tokens == there.tokens).all()
            assert (here.targets == there.targets).all()
    kept = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    assert kept <= sum(sizes) // 2
