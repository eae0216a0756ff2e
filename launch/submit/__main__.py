"""`moetrain submit +model=8x7b launch.address=http://127.0.0.1:8265`: train as a Ray job.

Owns the command's settings, what is sent to the cluster and what must not be. The settings are
those of training, composed and checked here first.
"""

import os
import sys
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, ConfigDict, Field, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from data_pipeline.commands.shell import as_typed, shell_command
from data_pipeline.settings import PathText
from launch.on_ray.access import START_WITH_TOKEN, real_address
from launch.plan import cluster_address
from launch.submit.job import JobUnreachable, JobWatch, entrypoint
from launch.submit.ray_jobs import JobRefused, JobsUnavailable, RayJobs
from moetrain.checks import ConfigError
from moetrain.command import Combination, config_dir, run_command
from moetrain.exit_codes import FAILED
from moetrain.redaction import REDACTED, redacted_arguments
from moetrain.settings import Config
from moetrain.train_command import check  # loads torch when it is called

# Ray's default of 3 s would kill a job during its checkpoint.
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
EXCLUDES = [".git", ".venv", "venv", "runs", "data", "hf", "wandb", ".mypy_cache", ".ruff_cache"]


def _not_empty(program: str) -> str:
    if not program.strip():
        raise ValueError("is empty: give a program's name or path on the head node, as python")
    return program


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class SubmitSettings:
    """How a job is submitted and waited for."""

    attach: str | None = None
    """An earlier job to wait for, instead of submitting one."""
    working_dir: PathText | None = "auto"
    """A folder with moetrain in it, copied to every node; null: moetrain is installed there; auto:
    the current folder if it is a checkout of moetrain, else null."""
    python: Annotated[str, AfterValidator(_not_empty)] = "python"
    """The interpreter on the head node; `~` is the home folder there."""
    stop_seconds: PositiveInt = 1800
    """Time that a stopped job has for a checkpoint before Ray kills it."""
    give_up_seconds: PositiveFloat = 600.0
    """Time without a connection to the head node after which waiting ends; the job continues."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class SubmitConfig(Config):
    """The training command's settings, and those of the submission."""

    submit: SubmitSettings = Field(default_factory=SubmitSettings)


def submit(config: SubmitConfig, arguments: list[str]) -> int:
    """Submits the training command with its arguments and waits; returns the job's exit code."""
    attached = config.submit.attach
    try:
        address = _address(config)
        jobs = RayJobs(address)
        insisted = attached or config.launch.allow_unauthenticated
        if not insisted and jobs.is_open():
            raise ConfigError(
                "launch.address",
                jobs.address,
                "this Ray cluster accepts jobs from anybody who reaches that port and runs any "
                f"code for them (CVE-2023-48022): start it with a token ({START_WITH_TOKEN}), or "
                "insist with launch.allow_unauthenticated=true",
            )
        job = attached or _submitted(config, arguments, jobs)
    except (JobsUnavailable, OSError) as error:
        print(f"moetrain: launch.address={config.launch.address}: {error}", file=sys.stderr)
        return FAILED
    except JobRefused as error:
        print(f"moetrain: {error}", file=sys.stderr)
        return FAILED
    again = waiting_command(job, jobs.address)
    if not attached:
        print(f"submitted {job}; to wait for it again: {again}", file=sys.stderr, flush=True)
    try:
        return JobWatch(jobs, job, give_up_seconds=config.submit.give_up_seconds).wait()
    except JobUnreachable as error:
        print(f"moetrain: {error}\nto wait for it again: {again}", file=sys.stderr)
        return FAILED


def waiting_command(job: str, address: str) -> str:
    """Returns the command that waits for an earlier job."""
    words = [f"submit.attach={as_typed(job)}", f"launch.address={as_typed(address)}"]
    return shell_command(["python", "-m", "launch.submit", *words])


def _submitted(config: SubmitConfig, arguments: list[str], jobs: RayJobs) -> str:
    here = jobs.is_on_this_machine()
    folder = _working_dir(config.submit.working_dir)
    said = f"a copy of {folder}, without {', '.join(EXCLUDES)}" if folder else "installed there"
    print(f"moetrain on the cluster: {said}", file=sys.stderr)
    return jobs.submit(
        # On the head node itself, paths mean what they mean to `python -m moetrain` here.
        entrypoint(
            arguments, python=config.submit.python, folder=str(Path.cwd()) if here else None
        ),
        working_dir=folder,
        excludes=_excludes(config, folder) if folder else [],
        env={STOP_WAIT: str(config.submit.stop_seconds)},
    )


def _address(config: SubmitConfig) -> str:
    """Returns the address of the job server, or of the cluster that has one."""
    given = config.launch.address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if given and urlsplit(given).scheme in ("http", "https"):
        return given
    found = given if given and given != "auto" else cluster_address(config.launch)
    if not found:
        raise ConfigError(
            "launch.address",
            config.launch.address,
            "no Ray cluster runs on this machine, and RAY_ADDRESS is not set: use the address that "
            "`ray start` prints for jobs, such as http://127.0.0.1:8265",
        )
    real_address(found, named=found)
    return found


def _working_dir(setting: str | None) -> Path | None:
    if setting != "auto":
        folder = Path(setting).absolute() if setting else None
        if folder and not _has_moetrain(folder):
            raise ConfigError(
                "submit.working_dir",
                setting,
                "has no moetrain/__main__.py: use a checkout, or null",
            )
        return folder
    return Path.cwd() if _has_moetrain(Path.cwd()) else None


def _has_moetrain(folder: Path) -> bool:
    return (folder / "moetrain" / "__main__.py").is_file()


def _excludes(config: SubmitConfig, folder: Path) -> list[str]:
    """Returns patterns that exclude data and runs; each begins at the folder itself.

    `data` alone would exclude conf/data as well.
    """
    own = [Path(config.run.dir), *([Path(config.data.dir)] if config.data.dir else [])]
    inside = [p.absolute().relative_to(folder) for p in own if p.absolute().is_relative_to(folder)]
    return [f"/{name}" for name in dict.fromkeys([*EXCLUDES, *map(str, inside)])]


def training_arguments(arguments: list[str]) -> list[str]:
    """Returns the arguments that are the training command's; raises ConfigError for a secret.

    Everybody who sees the cluster's jobs reads them.
    """
    kept = []
    for argument in arguments:
        key = argument.lstrip("+~").partition("=")[0]
        if key == "launch.address" or key.startswith("submit."):
            continue
        if redacted_arguments([argument]) != [argument]:
            raise ConfigError(
                key,
                REDACTED,
                "looks like a secret, and everybody who sees the cluster's jobs could read it: set "
                "it in the environment of the cluster's nodes",
            )
        kept.append(argument)
    return kept


def main() -> None:
    """Runs the command."""
    arguments = sys.argv[1:]  # as given: the job composes them again

    def one(config: SubmitConfig) -> int:
        check(config)
        return submit(config, training_arguments(arguments))

    def sweep(combinations: list[Combination[SubmitConfig]], _: Path) -> int:
        for combination in combinations:
            check(combination.settings)
        return submit(combinations[0].settings, training_arguments(arguments))

    run_command(
        one,
        tree=SubmitConfig,
        module="launch.submit",
        files=config_dir(),
        sweep=sweep,
        check=check,
    )


if __name__ == "__main__":
    main()
