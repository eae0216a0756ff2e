"""Commands: a Hydra command line becomes one validated tree, and errors become exit codes.

Owns the only import of Hydra in the package. A user's mistake ends in exit code 2 and one
message that names the key, the value, why it can't be, and the nearest thing that can.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar, get_origin, get_type_hints

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_pipeline.composition import only_compose, run_of_shown
from moetrain.checks import ConfigError, demand_no_secrets, nearest
from moetrain.config import known_keys, spelt, unknown_setting, validated
from moetrain.redaction import redacted_text

Tree = TypeVar("Tree")

DONE, FAILED, BAD_CONFIGURATION, STOPPED = 0, 1, 2, 75


@dataclasses.dataclass(frozen=True, kw_only=True)
class Combination(Generic[Tree]):
    """One combination of a sweep: the overrides it is composed from, and its settings."""

    overrides: tuple[str, ...]
    settings: Tree


def config_dir() -> Path:
    """Returns the folder of configuration files: the installed package's, else the checkout's."""
    package = Path(__file__).parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def run_command(
    main: Callable[[Tree], int],
    *,
    tree: type[Tree],
    module: str,
    files: Path | None = None,
    config_name: str = "config",
    sweep: Callable[[list[Combination[Tree]], Path], int] | None = None,
    check: Callable[[Tree], None] | None = None,
) -> None:
    """Runs `main` with the validated tree of the command line, and exits with its code.

    `files` is a folder with groups and a `config.yaml`, or the file named by `config_name`;
    without it the settings are the tree's own. `check` raises ConfigError for settings that
    contradict each other: also where `--cfg` shows them, which ends with the code of a run that
    is refused where they could not be one's. A sweep (`-m`) is handed to `sweep` with the folder
    that Hydra made for it, once every combination is known to be one; without `sweep` it runs
    `main` once a combination and exits with the worst code.
    """
    # Hydra would print an error at length and exit with 1; it is asked for the error instead.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv[1:] = [_with_plusses(a, tree) for a in sys.argv[1:]]
    if files:
        sys.argv[1:] = [_without_plus(a, files) for a in sys.argv[1:]]
    else:
        _register_bare(module)
    register(tree, name="schema")
    only_compose()
    codes: list[int] = []
    found: list[Combination[Tree]] = []
    folders: list[Path] = []
    if {"-m", "--multirun"} & set(sys.argv):
        where = "a sweep's settings are written into its multirun.yaml"

        def refuse_secrets() -> int:
            demand_no_secrets(sys.argv[1:], where=where)
            return DONE

        if code := _guarded(refuse_secrets, tree):
            raise SystemExit(code)

    # Hydra only composes; the work is done after it has returned, because it announces at length
    # whatever is raised inside it.
    def job(config: DictConfig) -> None:
        def compose() -> int:
            hydra_config = HydraConfig.get()
            overrides = tuple(hydra_config.overrides.task)
            found.append(Combination(overrides=overrides, settings=_tree(config, tree)))
            if hydra_config.mode == RunMode.MULTIRUN:
                folders.append(Path(hydra_config.sweep.dir))
            return DONE

        codes.append(_guarded(compose, tree))

    job.__module__ = module  # Hydra names the job after it
    entry = hydra.main(
        version_base="1.3",
        # With none Hydra would search the module's package, whose folders it takes for groups.
        config_path=str(files or "pkg://hydra.conf"),
        config_name=config_name if files else module,
    )(job)
    shown = run_of_shown(sys.argv[1:])
    try:
        codes.append(_guarded(lambda: entry() or DONE, tree))
        if shown is not None and not codes[-1]:  # Hydra has printed it, right or not
            sys.argv[1:] = shown
            codes.append(_guarded(lambda: entry() or DONE, tree))
            main = partial(_checked, check)
    except (ValueError, TypeError, yaml.YAMLError) as error:  # what Hydra itself lets through
        text = " ".join(str(error).split())
        print(f"moetrain: {redacted_text(text)}", file=sys.stderr)
        codes.append(BAD_CONFIGURATION)
    if sweep and folders:
        worst = max(codes)  # a combination that can't be ends a sweep before any of it begins
        raise SystemExit(worst or _guarded(partial(sweep, found, folders[0]), tree))
    try:
        for combination in found:
            codes.append(_guarded(partial(main, combination.settings), tree))
            if codes[-1] == STOPPED:
                break  # a stop is meant for the whole sweep
    except KeyboardInterrupt:
        print("moetrain: interrupted before anything was trained", file=sys.stderr)
        codes.append(FAILED)
    raise SystemExit(max(codes))


def _checked(check: Callable[[Tree], None] | None, settings: Tree) -> int:
    if check:
        check(settings)
    return DONE


def _without_plus(argument: str, files: Path) -> str:
    """Returns `model=x` for `+model=x`: for a group in the defaults list they mean the same."""
    group = re.match(r"\+([\w/-]+)=", argument)
    is_group = group and (files / group[1]).is_dir()
    return argument[1:] if is_group else argument


def _with_plusses(argument: str, tree: type) -> str:
    """Returns `++a.b.c=x` for `a.b.c=x` where `a.b` maps names that are the user's own to values.

    Hydra takes keys that no file has with plusses only.
    """
    key = re.match(r"([\w.-]+)=", argument)
    kind: Any = tree
    for part in key[1].split(".") if key else ():
        kind = get_type_hints(kind).get(part) if dataclasses.is_dataclass(kind) else None
        if get_origin(kind) is dict:
            return f"++{argument}"
    return argument


def register(tree: type, *, name: str) -> None:
    """Makes the tree known to Hydra as the schema that files and overrides are merged into."""
    schema: Any = _mutable(tree)
    if any(spelt(field.name) != field.name for field in dataclasses.fields(tree)):
        named = OmegaConf.structured(schema)
        schema = OmegaConf.create({spelt(key): named._get_node(key) for key in named})
    ConfigStore.instance().store(name=name, node=schema)


def _register_bare(module: str) -> None:
    """Stands in for a `config.yaml` where a command has no files."""
    ConfigStore.instance().store(
        name=module,
        node={
            "defaults": ["schema", "_self_", {"override hydra/job_logging": "none"}],
            "hydra": {
                "run": {"dir": "."},
                "output_subdir": None,
                "help": {"app_name": f"python -m {module}"},
            },
        },
    )


def _mutable(tree: type) -> type:
    """Returns a dataclass of the same settings that isn't frozen.

    OmegaConf makes a frozen dataclass read-only, and Hydra could not merge a file into it.
    """
    kinds = get_type_hints(tree)
    fields: list[Any] = []
    for known in dataclasses.fields(tree):
        kind = kinds[known.name]
        given = dataclasses.field(default=known.default, default_factory=known.default_factory)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            kind = _mutable(kind)
            given = dataclasses.field(default_factory=partial(_itself, kind))
        fields.append((known.name, kind, given))
    return dataclasses.make_dataclass(tree.__name__, fields, kw_only=True)


def _itself(kind: type) -> type:
    return kind  # as a default, the class stands for its settings, of which some may be missing


def _tree(config: DictConfig, tree: type[Tree]) -> Tree:
    missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(missing[0], "(missing)", f"must be given: add {missing[0]}=…")
    values: Any = OmegaConf.to_container(config, resolve=True)
    fields = {spelt(field.name): field.name for field in dataclasses.fields(tree)}  # type: ignore[arg-type]
    return validated({fields.get(key, key): value for key, value in values.items()}, tree)


def _guarded(work: Callable[[], int], tree: type) -> int:
    """Returns the exit code of some work; what a user did wrong becomes one message and 2."""
    try:
        return work()
    except ConfigError as error:
        message = str(error)
    except (HydraException, OmegaConfBaseException) as error:
        message = _explained(error, tree)
    print(f"moetrain: {redacted_text(message)}", file=sys.stderr)
    return BAD_CONFIGURATION


def _explained(error: Exception, tree: type) -> str:
    """Returns Hydra's chain of errors as one message of ours."""
    inner: BaseException = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    if isinstance(inner, OverrideParseException):
        first = str(inner).splitlines()[0]
        return f"{inner.override}: not of the form key=value ({first})"
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        close = nearest(name, error.options)
        return f"{group}={name}: there is no such {group}{close}; {', '.join(error.options)} are"
    key = str(getattr(inner, "full_key", "") or "")
    reason = str(inner).splitlines()[0]
    unknown = re.match(r"Key '(.+?)' (?:is )?not in ", reason)
    if unknown:
        parent, _, name = key.rpartition(".")
        known = [spelt(k) for k in known_keys(tree, parent.split(".") if parent else [])]
        kind = getattr(inner, "object_type", None)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            known = [f.name for f in dataclasses.fields(kind)]  # also of a list's elements
        return f"{key}: {unknown_setting(name or unknown[1], known)}"
    converted = re.match(r"Value '(.*)' of type '\w+' could not be converted to (\w+)", reason)
    if converted:
        return f"{key}={converted[1]}: must be of type {converted[2].lower()}"
    if reason.endswith("is not a ListConfig, list or tuple."):
        value = getattr(inner, "value", "")
        return f"{key}={value}: must be a list: use {key}=[{value}]"
    return f"{key}: {reason}" if key else reason
