"""The command `moetrain doctor`, or `python -m moetrain.doctor`: its settings and its text."""

import json
from importlib import import_module
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict
from pydantic.dataclasses import dataclass

from moetrain.checks import one_of
from moetrain.command import run_command
from moetrain.exit_codes import DONE, FAILED

STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DoctorSettings:
    """How the findings are printed."""

    format: Annotated[str, AfterValidator(one_of("text", "json"))] = "text"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DoctorCommand:
    """The command's tree."""

    doctor: DoctorSettings = DoctorSettings()


def main(settings: DoctorCommand) -> int:
    """Prints what works here; returns 0 if `auto` has a backend to take, else 1."""
    # Loads torch, which takes seconds: `--help` doesn't wait for it.
    findings = import_module("moetrain.doctor.examination").examine()
    print(json.dumps(findings, indent=1) if settings.doctor.format == "json" else text(findings))
    return DONE if findings["auto"] else FAILED


def text(findings: dict[str, Any]) -> str:
    """Returns the findings for people."""
    versions = {name: version or "none" for name, version in findings["versions"].items()}
    room = findings["room"]
    devices = [
        f"{d['name']} {d['model']}, {d['memory_gib']} GiB, compute capability {d['capability']}"
        for d in findings["devices"]
    ]
    groups = [name for name, here in findings["process_groups"].items() if here]
    lines = ["versions"]
    lines += [f"  {name:<13}{version}" for name, version in versions.items()]
    lines += ["machine"]
    lines += [f"  {device}" for device in devices or ["no CUDA device"]]
    lines += [
        f"  {room['cores']} cores, {room['free_memory_gib']} of {room['memory_gib']} GiB memory "
        f"free, {room['free_disk_gib']} GiB disk free here",
        f"  process groups: {', '.join(groups) or 'none'}",
        "expert backends (forward and backward of a small layer, against float64)",
    ]
    for backend in findings["backends"]:
        where = f"{backend['device']} {backend['dtype']}"
        result = (
            f"works: off by {backend['error']:.1e}, allowed are {backend['tolerance']:.1e}"
            if backend["works"]
            else f"no: {backend['reason']}"
        )
        lines.append(f"  {backend['name']:<13}{where:<16}{result}")
    lines.append(f"  {'auto':<13}takes {findings['auto'] or 'none: no backend works here'}")
    if findings["advice"]:
        lines.append(f"  {findings['advice']}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main, tree=DoctorCommand, module="moetrain.doctor")
