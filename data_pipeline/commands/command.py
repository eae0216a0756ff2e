"""Commands: a Hydra command line to typed settings, and errors to exit codes.

Owns running Hydra, and what a user sees of a mistake: one message on standard error, exit code 2
for bad input, 1 for a failure, 75 for a stop that the same command can resume from. Leaves the work
to the command's function.
"""

import difflib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import field, fields, is_dataclass, make_dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, NoReturn, TypeVar, get_args, get_origin

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from data_pipeline.commands.command_line import CommandLine, read_command_line
from data_pipeline.commands.composition import only_compose
from data_pipeline.commands.composition_errors import CompositionMessage
from data_pipeline.commands.settings_files import SettingsFiles
from data_pipeline.commands.settings_tree import plain_reason
from data_pipeline.commands.shell import escape_output
from data_pipeline.commands.standard_streams import ignore_broken_pipes
from data_pipeline.commands.stops import detach_terminal, stop_signals
from data_pipeline.extensions import load_extensions, load_installed
from data_pipeline.settings import DataError

Settings = TypeVar("Settings")

_FAILED = 1
_BAD_INPUT = 2
_STOPPED = 75

_GOES_ON = "; the same command resumes from what is finished"


def run_command(
    work: Callable[[Settings], None],
    *,
    settings_type: type[Settings],
    module: str,
    about: str,
    resumable: bool = False,
) -> None:
    """Runs `work` with the settings of the command line, and exits.

    `about` is what `--help` says the command does; `resumable` says that the same command continues
    from where it was stopped. Hydra makes no folders and no log files.
    """
    # Ask Hydra for the error: its own report is long, and it exits with 1 for a typo.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    ignore_broken_pipes()
    files = SettingsFiles(settings_type)
    line = CommandLine(flags=(), overrides=())

    # Work after Hydra has returned: Hydra reports what is raised inside it.
    configs: list[DictConfig] = []

    def job(config: DictConfig) -> None:
        configs.append(config)

    job.__module__ = module
    _register(settings_type, module=module, about=about)
    only_compose()
    escape_output()
    try:
        line = read_command_line(sys.argv[1:], settings_type, name=module)
        if line.asks_version:
            print(f"moetrain {version('moetrain')}")
            raise SystemExit(0)
        sys.argv[1:] = line.words
        # Without a path Hydra would take the folders of the module's package for groups.
        entry = hydra.main(version_base="1.3", config_path="pkg://hydra.conf", config_name=module)(
            job
        )
        files.compose(entry)
        if line.shown_run is not None:  # Hydra has printed it, right or not
            sys.argv[1:] = line.shown_run
            files.compose(entry)
            _settings(configs.pop(), settings_type)
        if resumable:  # a stop request, such as Ctrl-C
            _interrupt_on_stops()
        for config in configs:
            work(_settings(config, settings_type))
    except DataError as error:
        _end(_BAD_INPUT, module, str(error))
    except (HydraException, OmegaConfBaseException) as error:
        unknown = partial(_unknown, settings_type=settings_type)
        complaint = CompositionMessage(tree=settings_type, line=line, files=files, unknown=unknown)
        _end(_BAD_INPUT, module, complaint.about(error))
    except OSError as error:
        _end(_FAILED, module, str(error) + (_GOES_ON if resumable else ""))
    except KeyboardInterrupt:
        if resumable:
            _end(_STOPPED, module, f"stopped{_GOES_ON}")
        _end(_FAILED, module, "interrupted")


def _interrupt_on_stops() -> None:
    def interrupt(signum: int, _: object) -> NoReturn:
        detach_terminal(signum)
        raise KeyboardInterrupt

    for signum in stop_signals():
        signal.signal(signum, interrupt)


def _register(settings_type: type[Any], *, module: str, about: str) -> None:
    schema = _schema(settings_type)
    store = ConfigStore.instance()
    store.store(name=f"{module}.schema", node=schema)
    usage = " ".join(f"{field.name}=…" for field in fields(settings_type))
    store.store(
        name=module,
        node={
            "defaults": [
                f"{module}.schema",
                "_self_",
                {"override hydra/job_logging": "none"},
                {"override hydra/hydra_logging": "none"},
            ],
            "hydra": {
                "job": {"name": module},
                "run": {"dir": "."},
                "sweep": {"dir": ".", "subdir": "."},
                "output_subdir": None,
                "help": {
                    "app_name": f"python -m {module}",
                    "header": f"{about}\n\nUsage: python -m {module} {usage}",
                    "template": "${hydra.help.header}\n\nSettings (??? must be given):\n\n$CONFIG",
                },
            },
        },
    )


def _schema(settings_type: type[Any]) -> DictConfig:
    """The schema against which Hydra checks keys: a dictionary of settings accepts any key without
    a `+`.

    The entries of a dictionary are left to the settings' own checks: OmegaConf can't add to a
    dictionary of dataclasses key by key.
    """
    dictionaries = [known.name for known in fields(settings_type) if get_origin(known.type) is dict]
    given: list[Any] = [
        (
            known.name,
            Any if known.name in dictionaries else known.type,
            field(default=known.default, default_factory=known.default_factory),
        )
        for known in fields(settings_type)
    ]
    made: DictConfig = OmegaConf.structured(
        make_dataclass(settings_type.__name__, given, kw_only=True)
    )
    for name in dictionaries:
        OmegaConf.set_struct(made[name], False)
    for known in fields(settings_type):
        if is_dataclass(known.type):  # overrides couldn't change a frozen one
            OmegaConf.set_readonly(made[known.name], False)
    return made


def _settings(config: DictConfig, settings_type: type[Settings]) -> Settings:
    missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
    if missing:
        raise DataError(f"{missing[0]} must be given: add {missing[0]}=…")
    try:
        plain: Any = OmegaConf.to_container(config, resolve=True)
        if "extensions" in plain:
            plain["extensions"] = _extensions(plain["extensions"])
        settings: Settings = TypeAdapter(settings_type).validate_python(plain)
        return settings
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "unexpected_keyword_argument":
            raise DataError(_unknown(key, settings_type)) from error
        if first["type"] == "missing":
            raise DataError(f"{key} must be given: add {key}=…") from error
        reason = plain_reason(first["msg"])
        raise DataError(f"{key}={first['input']!r} can't be: {reason}") from error


def _extensions(names: list[str]) -> list[str]:
    """Imports the extensions that the user names or has installed; settings may refer to them."""
    try:
        loaded = load_extensions(names)
        load_installed()
    except ValueError as error:
        raise DataError(f"extensions={names}: {error}") from error
    return loaded


def _unknown(key: str, settings_type: type[Any]) -> str:
    names = [known.name for known in fields(settings_type)]
    for known in fields(settings_type):
        if get_origin(known.type) is dict and key.startswith(f"{known.name}."):
            inside = key.rpartition(".")[0]
            names = [f"{inside}.{entry.name}" for entry in fields(get_args(known.type)[1])]
    nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]
    return f"{key} is not a setting; did you mean {nearest}? There are {', '.join(names)}"


def _end(code: int, module: str, message: str) -> None:
    print(f"{module}: {message}", file=sys.stderr)
    raise SystemExit(code)
