"""The doctor tries the real backends; where one is broken or wrong it says so."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain.doctor import examination
from moetrain.doctor.__main__ import DoctorCommand, DoctorSettings, main, text
from moetrain.doctor.examination import advice, auto_choice, examine
from moetrain.kernels import expert_swiglu, known_answer
from moetrain.kernels.megablocks_ops import unavailable_because


@pytest.fixture(scope="module")
def findings() -> dict[str, Any]:
    return examine()


def named(findings: dict[str, Any], name: str) -> dict[str, Any]:
    return next(backend for backend in findings["backends"] if backend["name"] == name)


def test_the_backends_of_every_machine_work(findings: dict[str, Any]) -> None:
    for name in ("grouped_mm", "cpu"):
        backend = named(findings, name)
        assert backend["works"], backend["reason"]
        assert 0 < backend["error"] <= backend["tolerance"]


def test_megablocks_works_or_the_reason_is_the_backends(findings: dict[str, Any]) -> None:
    backend = named(findings, "megablocks")
    assert backend["reason"] == unavailable_because(backend["device"])
    assert backend["works"] == (backend["reason"] is None)


def test_people_are_told_what_json_says(findings: dict[str, Any]) -> None:
    printed = text(json.loads(json.dumps(findings)))
    for version in findings["versions"].values():
        assert (version or "none") in printed
    assert "works: off by" in printed
    assert f"takes {findings['auto']}" in printed
    assert f"{findings['room']['cores']} cores" in printed
    assert "gloo" in printed


def test_a_backend_that_raises_and_one_that_is_wrong_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    def broken(*tensors: Any, backend: str) -> Tensor:
        if backend == "cpu":
            raise RuntimeError("no such instruction")
        return expert_swiglu(*tensors, backend=backend) * (1 + 1e-4)

    monkeypatch.setattr(known_answer, "expert_swiglu", broken)
    monkeypatch.setattr(examination, "unavailable_because", lambda device: "not today")
    assert main(DoctorCommand(doctor=DoctorSettings(format="text"))) == 1
    printed = capsys.readouterr().out
    assert "no: RuntimeError: no such instruction" in printed
    assert "no: its results are wrong: off by" in printed
    assert "no: not today" in printed
    assert "takes none: no backend works here" in printed


def test_a_backend_whose_gradient_is_missing_does_not_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(known_answer, "expert_swiglu", lambda x, *_, backend: x * 1.0)
    result = examination._tried("cpu", "cpu")
    assert not result["works"]
    assert "appears to not have been used" in str(result["reason"])


def test_a_result_that_is_not_a_number_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:

    def broken(*tensors: Any, backend: str) -> Tensor:
        return expert_swiglu(*tensors, backend=backend) * float("nan")

    monkeypatch.setattr(known_answer, "expert_swiglu", broken)
    result = examination._tried("cpu", "cpu")
    assert not result["works"]
    assert "off by nan" in str(result["reason"])


@pytest.mark.parametrize(
    ("works", "device", "choice"),
    [
        (
            ["megablocks", "grouped_mm", "cpu"],
            "cuda",
            "the faster of megablocks and grouped_mm for the shape",
        ),
        (["grouped_mm", "cpu"], "cuda", "grouped_mm"),
        (["megablocks", "grouped_mm", "cpu"], "cpu", "cpu"),
        (["cpu"], "cuda", None),
    ],
)
def test_auto_takes_what_works_on_the_device(
    works: list[str], device: str, choice: str | None
) -> None:
    assert auto_choice(works, device=device) == choice


def test_an_a100_without_megablocks_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch, findings: dict[str, Any]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    told = advice(["grouped_mm", "cpu"])
    assert told is not None
    assert "bfloat16 on compute capability 8.0" in told
    assert "`make kernels`" in told
    assert told in text(findings | {"advice": told})
    assert advice(["megablocks", "grouped_mm"]) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert advice(["grouped_mm"]) is None


def test_the_command_prints_one_json_object() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moetrain.doctor", "doctor.format=json"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["versions"]["torch"] == torch.__version__
    assert named(printed, "cpu")["works"]
