"""Models that are fetched from the Hub: a real server, the Hub's own library, its own cache."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch

from moetrain.huggingface.hub import is_hub_name
from moetrain.import_hf import ImportSettings, import_folder
from tests.support.hub_server import COMMIT, HubServer
from tests.support.huggingface_folders import TINY, save_oracle

NAME = "lab/tiny-moe"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's files on the Hub: in shards, with all that isn't to be fetched beside them."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    save_oracle(folder, TINY, max_shard_size="20KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps({"made": name}))
    for name in ("consolidated.safetensors", "pytorch_model.bin", "README.md", "code.py"):
        (folder / name).write_bytes(b"not wanted")
    return folder


@pytest.fixture
def hub(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(model, name=NAME).serving() as server:
        # What HF_ENDPOINT would say, had it been there when the library was imported.
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


def fetch(tmp_path: Path, *, name: str = NAME, to: str = "run", **settings: str) -> int:
    cache = str(tmp_path / "cache")
    chosen = {"from_": name, "to": str(tmp_path / to), "cache_dir": cache, **settings}
    return import_folder(ImportSettings(**chosen))


def test_a_name_on_the_hub_is_fetched_with_what_an_import_needs_and_nothing_else(
    hub: HubServer, model: Path, tmp_path: Path
) -> None:
    """By the command as a user types it."""
    shards = {p.name for p in model.glob("model-*")}
    assert len(shards) > 1
    environ = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "",
    }  # fmt: skip
    words = ["moetrain.import_hf", f"from={NAME}", "to=run", "revision=main"]
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=tmp_path, env=environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"imported  {NAME}: " in done.stdout
    assert hub.fetched() == shards | {
        "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    event = json.loads((tmp_path / "run/events.jsonl").read_text().splitlines()[0])
    assert (event["source"], event["commit"]) == (NAME, COMMIT)
    (snapshot,) = (tmp_path / "home/hub").glob("models--*/snapshots/*")
    assert {p.name for p in snapshot.glob("*.safetensors")} == shards
    assert all((snapshot / name).read_bytes() == (model / name).read_bytes() for name in shards)


def test_a_file_that_is_cut_off_on_the_way_goes_on_from_there(
    hub: HubServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 64)  # of 10 MB
    largest = max(model.glob("model-*"), key=lambda path: path.stat().st_size)
    hub.cut.add(largest.name)
    assert fetch(tmp_path) == 0
    ranges = [given for _, path, given in hub.requests if path.endswith(largest.name) and given]
    (first,) = {int(given.removeprefix("bytes=").split("-")[0]) for given in ranges} - {0}
    assert largest.stat().st_size // 2 - 64 <= first <= largest.stat().st_size // 2


def test_what_is_in_the_cache_is_not_fetched_again_and_serves_offline(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fetch(tmp_path) == 0
    hub.requests.clear()
    assert fetch(tmp_path, to="again") == 0
    assert not hub.fetched()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert fetch(tmp_path, to="offline") == 0
    assert not hub.requests


def test_a_model_that_cannot_be_imported_is_refused_before_its_weights_are_fetched(
    hub: HubServer, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(json.dumps(json.loads(config) | {"model_type": "gpt2"}))
    try:
        assert fetch(tmp_path) == 2
    finally:
        (model / "config.json").write_text(config)
    assert "only 'mistral', 'llama', " in capsys.readouterr().err
    assert not [name for name in hub.fetched() if name.endswith(".safetensors")]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "gated", "said"),
    [
        ({"name": "lab/none"}, False, "is no folder here, and the Hub has no such model, or not"),
        ({"revision": "v9"}, False, "has no revision=v9 on the Hub"),
        ({}, True, f"do so at https://huggingface.co/{NAME}, then log in"),
    ],
)
def test_what_the_hub_has_not_is_said(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    settings: dict[str, str], gated: bool, said: str,
) -> None:  # fmt: skip
    hub.gated = gated
    assert fetch(tmp_path, **settings) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("offline", "code", "said"),
    [
        (True, 2, "is a name on the Hub, HF_HUB_OFFLINE is set, and"),
        (False, 1, f"from={NAME}: can't be fetched from the Hub: "),
    ],
)
def test_without_a_network_the_command_that_fetches_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    offline: bool, code: int, said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    assert fetch(tmp_path) == code
    error = capsys.readouterr().err
    assert said in error
    assert f"`hf download {NAME} --exclude 'consolidated*' " in error
    assert "--local-dir tiny-moe` fetches it: give that folder here" in error


def test_without_the_hubs_library_the_command_that_fetches_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # what an import of it then raises
    assert fetch(tmp_path) == 2
    assert "pip install huggingface_hub" in capsys.readouterr().err


def test_a_folder_is_a_folder_and_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/mine").mkdir(parents=True)
    assert is_hub_name("mistralai/Mixtral-8x7B-v0.1")
    for path in ("models/mine", "models/misspelt", "/a/b", "../x", "./a/b", "~/x", "a/b/c", "a"):
        assert not is_hub_name(path), path
    assert import_folder(ImportSettings(from_="models/misspelt", to="run")) == 2
    assert "from=models/misspelt: is no folder" in capsys.readouterr().err
    given = ImportSettings(from_="models/mine", to="run", revision="v1")
    assert import_folder(given) == 2
    assert "revision=v1: is for models on the Hub" in capsys.readouterr().err
