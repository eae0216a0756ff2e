"""Commands: a Hydra command line becomes one validated tree, and errors become exit codes.

Owns the only import of Hydra in the package; what both entries share of it is in `data_pipeline`.
A user's mistake ends in exit code 2 and one message that names the key, the value, why it is
invalid, and the nearest valid one.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_pipeline.commands.command_line import (
    CommandLine,
    as_one_run,
    read_command_line,
    values_of,
)
from data_pipeline.commands.composition import only_compose
from data_pipeline.commands.composition_errors import CompositionMessage, no_group
from data_pipeline.commands.settings_files import SettingsFiles
from data_pipeline.commands.settings_tree import setting_name, type_at
from data_pipeline.commands.shell import escape_output
from data_pipeline.commands.standard_streams import ignore_broken_pipes
from data_pipeline.extensions import load_extensions, load_installed
from moetrain.checks import ConfigError, require_no_secrets
from moetrain.composing import complete
from moetrain.exit_codes import BAD_CONFIGURATION, DONE, FAILED, STOPPED
from moetrain.redaction import redacted_text
from moetrain.settings.validation import validated
from moetrain.sweeping.plugins import USABLE, SweepEnded, SweepPlugins, require_usable

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Combination(Generic[Tree]):
    """One combination of a sweep: the words it is composed from, and its settings."""

    overrides: tuple[str, ...]
    settings: Tree
    flags: tuple[str, ...] = ()
    """The options that select the files to compose from: `--config-dir`."""


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
    batches: Callable[[Path], Any] | None = None,
) -> None:
    """Runs `main` with the validated tree of the command line, and exits with its code.

    `files` is a folder with groups and a `config.yaml`, or the file named by `config_name`;
    without it the settings are the tree's own. `check` raises ConfigError for settings that
    contradict each other: also where `--cfg` shows them, which ends with the code of a run that
    is refused where they could not be one's. A sweep (`-m`) is handed to `sweep` with the folder
    that Hydra made for it, once every combination is known to be one; without `sweep` it runs
    `main` once a combination and exits with the worst code. `batches` begins a sweep of which a
    sweeper or launcher of others runs the trials, in a folder.
    """
    # Hydra would print a long error and exit with 1; this makes it raise the error instead.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    ignore_broken_pipes()
    front = _Front(tree)
    if code := front.guarded(lambda: front.read(sys.argv[1:], files=files, name=config_name)):
        raise SystemExit(code)
    line = front.line
    if line.asks_version:
        print(f"moetrain {version('moetrain')}")
        raise SystemExit(DONE)
    sys.argv[1:] = line.words
    if not files:
        _register_bare(module)
    register(tree, name="schema")
    only_compose(USABLE, complete=complete)
    escape_output()
    codes: list[int] = []
    found: list[Combination[Tree]] = []
    folders: list[Path] = []

    # Hydra only composes; the work is done after it has returned, because it announces at length
    # whatever is raised inside it.
    def job(config: DictConfig) -> None:
        def compose() -> int:
            hydra_config = HydraConfig.get()
            found.append(front.combination(config))
            if hydra_config.mode == RunMode.MULTIRUN:
                folders.append(Path(hydra_config.sweep.dir))
            return DONE

        codes.append(front.guarded(compose))

    job.__module__ = module  # Hydra names the job after it
    entry = hydra.main(
        version_base="1.3",
        # With none Hydra would search the module's package, whose folders it takes for groups.
        config_path=str(files or "pkg://hydra.conf"),
        config_name=config_name if files else module,
    )(job)
    plugins = SweepPlugins(batches, combination=front.combination, words=sys.argv[1:])
    try:
        with plugins.in_force():
            codes.append(front.guarded(lambda: front.compose(entry)))
    except SweepEnded as ended:
        codes.append(ended.code)
    if plugins.began:
        raise SystemExit(plugins.close(max(codes)))
    if line.shown_run is not None and not codes[-1]:  # Hydra has printed it, right or not
        sys.argv[1:] = line.shown_run
        codes.append(front.guarded(lambda: front.compose(entry)))
        main = partial(_checked, check)
    if sweep and folders:
        worst = max(codes)  # a combination that can't be ends a sweep before any of it begins
        raise SystemExit(worst or front.guarded(partial(sweep, found, folders[0])))
    raise SystemExit(max([*codes, *_each(main, found, front)]))


def composed(overrides: Sequence[str], *, tree: type[Tree], files: Path) -> Tree:
    """Returns the validated tree of a command line's overrides, and runs nothing.

    Raises ValueError for what can't be composed; its subclass ConfigError for an invalid value.
    """
    front = _Front(tree)
    front.read(overrides, files=files, name="config")
    if front.line.flags or front.line.is_sweep:
        raise ValueError(f"{' '.join(overrides)}: overrides alone make one configuration")
    register(tree, name="schema")
    only_compose(complete=complete)
    found: list[DictConfig] = []
    try:
        with hydra.initialize_config_dir(str(files), version_base="1.3"):
            front.files.compose(
                lambda: found.append(hydra.compose("config", list(front.line.overrides)))
            )
    except (HydraException, OmegaConfBaseException) as error:
        if isinstance(error.__context__, ConfigError):
            raise error.__context__ from None
        complaint = CompositionMessage(tree=tree, line=front.line, files=front.files)
        raise ValueError(redacted_text(complaint.about(error))) from None
    return front.settings(found[0])


def _each(
    main: Callable[[Tree], int], found: Iterable[Combination[Tree]], front: "_Front[Tree]"
) -> Iterator[int]:
    """Runs each combination, and yields its exit code."""
    try:
        for one in found:
            code = front.guarded(partial(main, one.settings))
            yield code
            if code == STOPPED:
                return  # a stop is meant for the whole sweep
    except KeyboardInterrupt:
        print("moetrain: interrupted before anything was trained", file=sys.stderr)
        yield FAILED


def _checked(check: Callable[[Tree], None] | None, settings: Tree) -> int:
    if check:
        check(settings)
    return DONE


def register(tree: type, *, name: str) -> None:
    """Registers the tree with Hydra as the schema that files and overrides are merged into."""
    schema: Any = _mutable(tree)
    if any(setting_name(field.name) != field.name for field in dataclasses.fields(tree)):
        named = OmegaConf.structured(schema)
        schema = OmegaConf.create({setting_name(key): named._get_node(key) for key in named})
    ConfigStore.instance().store(name=name, node=schema)


def _register_bare(module: str) -> None:
    """Replaces `config.yaml` for a command without files."""
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


def _of_files(overrides: Iterable[str]) -> Iterator[str]:
    """Yields the overrides of Hydra's own that decide which files are composed."""
    yield from (o for o in overrides if o.lstrip("+").startswith("hydra.searchpath="))


class _Front(Generic[Tree]):
    """Parses a command line, composes its settings, and reports errors."""

    def __init__(self, tree: type[Tree]) -> None:
        self._tree = tree
        self.files = SettingsFiles(tree)
        self.line = CommandLine(flags=(), overrides=())

    def read(self, words: Sequence[str], *, files: Path | None, name: str) -> int:
        """Parses a command line; returns the exit code."""
        self.line = read_command_line(words, self._tree, files=files, name=name)
        require_usable(self.line.overrides, is_sweep=self.line.is_sweep)
        if self.line.is_sweep:
            require_no_secrets(words, where="a sweep's settings are written into its multirun.yaml")
        return DONE

    def compose(self, entry: Callable[[], Any]) -> int:
        """Makes Hydra compose; returns the exit code."""
        self.files.compose(entry)
        return DONE

    def settings(self, config: DictConfig) -> Tree:
        """Returns the validated tree of what Hydra composed."""
        missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
        if missing:
            raise ConfigError(missing[0], "(missing)", f"must be given: add {missing[0]}=…")
        values: Any = OmegaConf.to_container(config, resolve=True)
        if "extensions" in values:
            values["extensions"] = self._extensions(values["extensions"])
        fields = {setting_name(field.name): field.name for field in dataclasses.fields(self._tree)}  # type: ignore[arg-type]
        try:
            return validated({fields.get(k, k): value for k, value in values.items()}, self._tree)
        except ConfigError as error:
            if "." not in error.key and type_at(self._tree, error.key) is None:
                if "did you mean" in error.reason:
                    raise
                reason = no_group(error.key, str(error.value), config_dir=self.line.config_dir)
                raise ConfigError(error.key, error.value, reason) from None
            several = isinstance(error.value, str) and len(values_of(error.value)) > 1
            if self.line.is_sweep or not several:
                raise
            reason = f"{error.reason}; to run once for each of these, add -m"
            raise ConfigError(error.key, error.value, reason) from None

    def _extensions(self, names: list[str]) -> list[str]:
        """Imports the extensions that the user names or has installed, for settings to name."""
        try:
            loaded = load_extensions(names)
            load_installed()
        except ValueError as error:
            raise ConfigError("extensions", f"[{','.join(names)}]", str(error)) from None
        return loaded

    def combination(self, config: DictConfig) -> Combination[Tree]:
        """Returns what Hydra composed, with the words that it is composed from."""
        overrides = HydraConfig.get().overrides
        return Combination(
            overrides=(*_of_files(overrides.hydra), *map(as_one_run, overrides.task)),
            settings=self.settings(config),
            flags=self.line.composing_flags,
        )

    def guarded(self, work: Callable[[], int]) -> int:
        """Does some work and returns its exit code; a user's error becomes one message and 2."""
        try:
            return work()
        except ConfigError as error:
            message = str(error)
        except (HydraException, OmegaConfBaseException) as error:
            complaint = CompositionMessage(tree=self._tree, line=self.line, files=self.files)
            message = complaint.about(error)
        print(f"moetrain: {redacted_text(message)}", file=sys.stderr)
        return BAD_CONFIGURATION
