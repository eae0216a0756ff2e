"""What counts as a secret and what doesn't, and that a run leaves no secret behind."""

import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moetrain.checks import ConfigError, require_no_secret_values, require_no_secrets
from moetrain.redaction import (
    REDACTED,
    RedactingFormatter,
    is_secret_name,
    redacted,
    redacted_arguments,
    redacted_text,
)
from tests.support.runs import events_of, tiny_config, tiny_values, write_shards

KEY = "0123456789abcdef0123456789abcdef01234567"  # of the shape that W&B's keys have


@pytest.mark.parametrize(
    "name",
    [
        "WANDB_API_KEY", "cluster.env.WANDB_API_KEY", "token", "hf_token", "HF_TOKEN", "authToken",
        "AWS_SECRET_ACCESS_KEY", "aws_access_key_id", "AWS_SESSION_TOKEN", "password", "DB_PASSWD",
        "client-secret", "apiKey", "apikey", "private_key", "Authorization", "X-Amz-Signature",
        "X-Amz-Credential", "passphrase", "RAY_AUTH_TOKEN", "AZURE_STORAGE_ACCOUNT_KEY",
    ],
)  # fmt: skip
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer", "data.tokenizer", "train/tokens", "num_tokens", "perf/tokens_per_second",
        "flops_per_token", "max_token", "num_cut_tokens", "key", "keys", "monkey", "keep_every",
        "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "AWS_SHARED_CREDENTIALS_FILE", "secretary",
        "GOOGLE_APPLICATION_CREDENTIALS", "design", "tokens", "router/expert_load",
    ],
)  # fmt: skip
def test_names_that_only_look_like_it(name: str) -> None:
    assert not is_secret_name(name)


def test_no_setting_of_ours_is_taken_for_a_secret(tmp_path: Path) -> None:
    plain = dataclasses.asdict(tiny_config(tmp_path, shards=tmp_path))
    assert redacted(plain, environ={}) == json.loads(json.dumps(plain))
    require_no_secret_values(plain)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("put hf_" + "a1B2" * 9 + " there", "put [redacted] there"),
        ("sk-ant-" + "x" * 24, REDACTED),
        ("id AKIAIOSFODNN7EXAMPLE.", "id [redacted]."),
        ("ghp_" + "0" * 36, REDACTED),
        ("https://ann:pa55@host:8080/x", "https://[redacted]@host:8080/x"),
        ("https://host/x?X-Amz-Signature=abcd&part=3",
         "https://host/x?X-Amz-Signature=[redacted]&part=3"),
        ("Authorization: Bearer abc.def", "Authorization: [redacted]"),
        ("{'password': 'a b', 'user': 'ann'}", "{'password': '[redacted]', 'user': 'ann'}"),
        ('{"env": "x=1 password=abc"}', '{"env": "x=1 password=[redacted]"}'),
        ('{"api_key": "abc"}', '{"api_key": "[redacted]"}'),
        ("password=1234", "password=[redacted]"),
        ("-----BEGIN RSA PRIVATE KEY-----\nab\n-----END RSA PRIVATE KEY-----", REDACTED),
        ("the key is " + KEY, "the key is [redacted]"),
    ],
)  # fmt: skip
def test_secrets_in_a_text(text: str, shown: str) -> None:
    assert redacted_text(text, environ={"WANDB_API_KEY": KEY}) == shown


@pytest.mark.parametrize(
    "text",
    [
        "tokenizer=mixtral-v1", "train/tokens=4096 at 7.7k tokens/s", "loss per token: 1.25",
        "fingerprint 0123456789abcdef0123456789abcdef01234567", "s3://bucket/runs/sk-learn",
        "token=${oc.env:HF_TOKEN}", "a@b.example", "password=null", "http://host:80/a@b",
    ],
)  # fmt: skip
def test_a_text_without_secrets_stays_as_it_is(text: str) -> None:
    assert redacted_text(text, environ={"SHORT_TOKEN": "tokens", "HOME": "/root"}) == text


def test_a_command_line_is_redacted_word_by_word() -> None:
    given = ["-m", "cluster.env.PASSWORD=two words", "model=toy", "+cluster.env={HF_TOKEN: abc}"]
    assert redacted_arguments(given) == [
        "-m", "cluster.env.PASSWORD=[redacted]", "model=toy", "+cluster.env={HF_TOKEN: [redacted]}",
    ]  # fmt: skip


def test_a_command_line_that_others_would_read_may_have_no_secret() -> None:
    require_no_secrets(["model=toy", "cluster.env.HF_TOKEN='${oc.env:HF_TOKEN}'"], where="")
    with pytest.raises(ConfigError, match=r"^cluster.env.HF_TOKEN=\[redacted\]: .* shown to all"):
        require_no_secrets(["cluster.env.HF_TOKEN=abc"], where="shown to all")


def test_a_message_about_a_setting_does_not_tell_a_secret() -> None:
    assert "abc" not in str(ConfigError("cluster.env.HF_TOKEN", "abc", "is too short"))


def test_log_records_and_their_tracebacks_are_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-secret-of-ours")
    try:
        raise ValueError("no: a-secret-of-ours")
    except ValueError:
        record = logging.LogRecord(
            "x", logging.ERROR, "", 1, "got %s", ("a-secret-of-ours",), sys.exc_info()
        )
    text = RedactingFormatter().format(record)
    assert "a-secret-of-ours" not in text
    assert f"ValueError: no: {REDACTED}" in text


def test_a_secret_that_would_be_a_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with pytest.raises(ConfigError, match=r"^observe.wandb.group=\[redacted\]: is or holds"):
        tiny_config(tmp_path, shards=tmp_path, observe__wandb__group=f"by {KEY}")
    with pytest.raises(ConfigError, match="stands for a secret, which was not saved"):
        tiny_config(tmp_path, shards=tmp_path, cluster__env={"WANDB_API_KEY": REDACTED})


@pytest.mark.slow
def test_a_run_leaves_no_secret_behind(tmp_path: Path) -> None:
    """The whole folder of a real run is searched for keys that it was given in several ways."""
    shards = write_shards(tmp_path)
    secrets = {
        "WANDB_API_KEY": KEY,
        "MY_PASSWORD": "correct-horse",
        "HF_TOKEN": "of-the-environment",
    }
    values: dict[str, Any] = tiny_values(tmp_path, shards=shards)
    values["model"] |= {"router": {}}
    words = [
        f"{group}.{key}={value}"
        for group in ("model", "train", "run", "data", "checkpoint", "schedule")
        for key, value in values[group].items()
        if not isinstance(value, dict)
    ]
    command = [
        sys.executable, "-m", "moetrain", *words, "observe.log_every_steps=1",
        "observe.wandb.mode=offline", "launch.mode=ray", "launch.num_workers=2",
        "cluster.env.WANDB_API_KEY=${oc.env:WANDB_API_KEY}",
        "cluster.env.MY_PASSWORD=correct-horse",
    ]  # fmt: skip
    environ = {**os.environ, "WANDB_API_KEY": KEY, "HF_TOKEN": "of-the-environment"}

    def moetrain(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more], cwd=tmp_path, env=environ, capture_output=True, text=True,
            timeout=200, check=False,
        )  # fmt: skip

    done = moetrain()
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/tiny"
    assert f"WANDB_API_KEY: '{REDACTED}'" in (run / "config.yaml").read_text()
    assert f"MY_PASSWORD={REDACTED}" in events_of(tmp_path)[0]["command"]
    everything = [path for path in run.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in everything)
    inline = moetrain("launch.mode=inline", "launch.num_workers=1", "train.num_steps=10")
    assert inline.returncode == 0, inline.stderr  # it resumed: nothing that was redacted was missed
    for path in [path for path in run.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        for name, secret in secrets.items():
            assert secret.encode() not in content, f"{name} stands in {path.relative_to(run)}"
    for shown in (done.stdout, done.stderr, inline.stdout, inline.stderr):
        assert not any(secret in shown for secret in secrets.values())
    sweep = moetrain("-m", "seed=1,2")
    assert sweep.returncode == 2
    assert re.search(r"MY_PASSWORD=\[redacted\]: is a secret, .*multirun.yaml", sweep.stderr)
    assert not (tmp_path / "runs/sweeps").exists()
