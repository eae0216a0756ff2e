"""The words of a command line: texts as they are typed, flags anywhere, and the form to type."""

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from data_pipeline.commands.command_line import (
    CommandLineError,
    as_one_run,
    explained,
    read_command_line,
    values_of,
)
from data_pipeline.commands.shell import as_typed, quoted
from tests.data_pipeline.test_shell import ODD_TEXTS

URLS = ["file:///tmp/x", "s3://lab/runs (new)", "lr=1e-3", "a\\b:c", "[a:b]"]


class Kind(StrEnum):
    one = "one"


@dataclass(frozen=True, kw_only=True)
class Source:
    corpus: str
    licence: str | None = None
    share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str | None = None
    dir: Annotated[str, "a path"] = "runs"
    kind: Kind = Kind.one
    size: int = 0
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class Tree:
    part: Part = field(default_factory=Part)
    to: str = "x"
    from_: str = "y"
    names: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)
    on: bool = False


def value(*words: str, files: Path | None = None) -> Any:
    """Returns the key and the value that Hydra makes of the last override."""
    line = read_command_line(words, Tree, files=files)
    parsed = OverridesParser.create().parse_override(line.overrides[-1])
    assert not parsed.is_sweep_override(), line.overrides
    return parsed.key_or_group, parsed.value()


@pytest.mark.parametrize("text", [t for t in ODD_TEXTS if "${" not in t])
@pytest.mark.parametrize(
    "key", ["part.name", "part.dir", "to", "from", "env.X", "sources.a.corpus"]
)
def test_a_text_is_taken_as_it_is_typed(text: str, key: str) -> None:
    meant: str | None = "a" if text == '"a"' else text  # quotes of the grammar's own
    if text == "null" and key == "part.name":
        meant = None
    assert value(f"{key}={text}") == (key, meant)


def test_quotes_of_the_grammar_and_references_keep_their_meaning() -> None:
    assert value("to='a, b'") == ("to", "a, b")
    assert value('to="1.10"') == ("to", "1.10")
    assert value("to=run-${seed}") == ("to", "run-${seed}")
    assert value("to=essai ${seed}") == ("to", "essai ${seed}")
    with pytest.raises(CommandLineError, match=r"begins a reference.*write \\\$\{"):
        read_command_line(["to=${x"], Tree)


def test_texts_within_lists_and_dictionaries_are_taken_as_typed() -> None:
    assert value("names=[1.10,a=b,'c,d']") == ("names", ["1.10", "a=b", "c,d"])
    assert value("env={A:1e5,B:x=y}") == ("env", {"A": "1e5", "B": "x=y"})
    whole = {"a": {"corpus": "1.10", "share": 0.5}, "b": {"corpus": "é"}}
    assert value("sources={a:{corpus:1.10,share:0.5},b:{corpus:é}}") == ("sources", whole)
    assert value("sources.2024-01.licence=1.0") == ("sources", {"2024-01": {"licence": "1.0"}})
    for word in ("sources={1e5:{corpus:x}}", "weights.1e5=1", "weights={true:1}"):
        with pytest.raises(CommandLineError, match="reads as something else"):
            read_command_line([word], Tree)


def test_what_is_no_text_is_left_to_hydra() -> None:
    assert value("part.size=1_000") == ("part.size", 1000)
    assert value("on=true") == ("on", True)
    assert value("part.betas=[0.9,0.99]") == ("part.betas", [0.9, 0.99])
    assert value("weights.en=1e-3") == ("weights.en", 1e-3)
    assert read_command_line(["hydra.run.dir=a=b"], Tree).overrides == ("hydra.run.dir=a=b",)


def test_a_sweep_takes_each_text_as_it_is_typed() -> None:
    def swept(word: str) -> list[Any]:
        line = read_command_line(["-m", word], Tree)
        parsed = OverridesParser.create().parse_override(line.overrides[0])
        assert parsed.is_sweep_override(), line.overrides
        return [
            OverridesParser.create().parse_override(f"x={one}").value()
            for one in parsed.sweep_string_iterator()
        ]

    assert swept("to=83e2010,1.10, é ,a=b") == ["83e2010", "1.10", "é", "a=b"]
    assert swept("to=choice(1.10,'a,b')") == ["1.10", "a,b"]
    assert swept("names=[a=b],[1.10,c]") == [["a=b"], ["1.10", "c"]]
    assert swept("part.size=range(1,3)") == [1, 2]
    assert swept("to=range(1,3)") == [1, 2]
    for one in ("to='a,b'", "to=lr=1e-3,wd=[0.1]", "to=a", "names=[a,b]"):
        key = one.partition("=")[0]
        line = read_command_line(["-m", one], Tree)
        assert line.typed.get(line.overrides[0], one) == one
        parsed = OverridesParser.create().parse_override(line.overrides[0])
        assert (parsed.key_or_group, parsed.is_sweep_override()) == (key, False)


def test_several_values_are_told_from_one() -> None:
    assert values_of("a,b") == ["a", "b"]
    assert values_of("a, 'b,c' ,[d,e]") == ["a", "'b,c'", "[d,e]"]
    assert values_of("lr=1e-3,wd=[0.1]") == ["lr=1e-3,wd=[0.1]"]
    assert values_of("it's, isn't") == ["it's", "isn't"]
    assert len(values_of("a")) == 1


@pytest.mark.parametrize(
    ("words", "flags", "overrides"),
    [
        (["a=1", "-m", "b=2"], ["-m"], ["a=1", "b=2"]),
        (["a=1", "--config-dir", "x", "b=2", "-m"], ["--config-dir", "x", "-m"], ["a=1", "b=2"]),
        (["a=1", "--config-dir=x=y", "b=2"], ["--config-dir=x=y"], ["a=1", "b=2"]),
        (["-cd", "x", "a=1", "-cn", "n"], ["-cd", "x", "-cn", "n"], ["a=1"]),
        (["a=1", "--cfg", "job", "--resolve"], ["--cfg", "job", "--resolve"], ["a=1"]),
        (["a=1", "-cjob", "b=2", "-p", "run"], ["-cjob", "-p", "run"], ["a=1", "b=2"]),
        (["--package=run", "-c", "job", "a=1"], ["--package=run", "-c", "job"], ["a=1"]),
        (["a=1", "--info", "b=2"], ["--info"], ["a=1", "b=2"]),
        (["a=1", "--info", "defaults", "b=2"], ["--info", "defaults"], ["a=1", "b=2"]),
        (["a=1", "--multi", "--", "b=2"], ["--multi"], ["a=1", "b=2"]),
        (["a=1", "-h"], ["-h"], ["a=1"]),
    ],
)  # fmt: skip
def test_flags_stand_anywhere_with_their_values(
    words: list[str], flags: list[str], overrides: list[str]
) -> None:
    line = read_command_line(words, Tree)
    assert line.words == [*flags, *overrides]
    assert line.is_sweep == any(flag in ("-m", "--multi") for flag in flags)


def test_a_flag_that_there_is_not_is_named_with_the_nearest() -> None:
    with pytest.raises(CommandLineError, match=r"--confg-dir: .* did you mean --config-dir\?"):
        read_command_line(["a=1", "--confg-dir", "x"], Tree)
    with pytest.raises(CommandLineError, match=r"--config: .* did you mean --config"):
        read_command_line(["--config", "x"], Tree)


def test_what_another_command_needs_to_compose_the_same() -> None:
    line = read_command_line(["-m", "a=1", "-cd", "x", "--cfg", "job", "--config-name=n"], Tree)
    assert line.composing_flags == ("-cd", "x", "--config-name=n")
    assert (line.config_dir, line.config_name) == (Path("x"), "n")


def test_a_plus_is_left_out_only_where_a_choice_replaces_another(tmp_path: Path) -> None:
    for group in ("model", "variant", "brought"):
        (tmp_path / group).mkdir()
    defaults = "defaults: [schema, {optional model@part: toy}, _self_]"
    (tmp_path / "config.yaml").write_text(defaults)
    (tmp_path / "model/y.yaml").write_text("defaults: [/brought: z]")
    words = ["+model=x", "model=1.10", "+variant=é", "variant=c", "brought=d"]
    line = read_command_line(words, Tree, files=tmp_path, name="config")
    assert line.overrides == (
        "model=x", 'model="1.10"', '+variant="é"', "+variant=c", "+brought=d"
    )  # fmt: skip
    # A file that is chosen brings the group along.
    line = read_command_line(["model=y", "+brought=d"], Tree, files=tmp_path, name="config")
    assert line.overrides == ("model=y", "brought=d")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("part.size=1=2", "part.size=1=2: must be one whole number: type part.size=NUMBER"),
        ("names=[a", "names=[a: must be a list: type 'names=[ONE,OTHER]'"),
        ("part.betas=[a", "type 'part.betas=[ONE,OTHER]'"),
        ("on=a=b", "type on=true"),
        ("weights=a=b", "type weights.NAME=VALUE"),
        ("part.naem=a=b", "part.naem: there is no such setting (did you mean 'name'?)"),
        ("betas=a=b", "betas: there is no such setting (did you mean 'part.betas'?)"),
        ("toy", "toy: not of the form key=value"),
    ],
)
def test_a_word_that_hydra_cannot_read_is_told_the_form_to_type(override: str, said: str) -> None:
    assert said in explained(override, Tree, reason="mismatched input")


def runs_of(*words: str) -> list[list[str]]:
    """Returns the words that a sweep of these starts each run with."""
    line = read_command_line(["-m", *words], Tree)
    given = OverridesParser.create().parse_overrides(list(line.overrides))
    [runs] = BasicSweeper.split_arguments(given, None)
    return [[as_one_run(word) for word in run] for run in runs]


def read_as_text(word: str) -> str:
    config = OmegaConf.create({"x": ""})
    config.x = value(word)[1]
    return str(config.x)


@pytest.mark.parametrize("text", [*ODD_TEXTS, *URLS])
def test_a_run_of_a_sweep_reads_a_text_as_it_was_typed(text: str) -> None:
    several = f"to={quoted(text)},{quoted(text)}"
    for words in ([f"to={as_typed(text, swept=True)}"], [several]):
        for run in runs_of("part.size=1,2", *words):
            assert read_as_text(run[1]) == text
    [[listed]] = runs_of(f"names=[{quoted(text)},b]")
    read = OmegaConf.to_container(OmegaConf.create({"x": value(listed)[1]}), resolve=True)
    assert read == {"x": [text, "b"]}


def test_a_run_of_a_sweep_keeps_lists_dictionaries_and_references() -> None:
    [[names, env, weights, size]] = runs_of(
        "names=[a:b,c d]", "env={A:file:///x,B:b}", "weights={a:1.5}", "to=${part.size}/a:b"
    )
    assert value(names) == ("names", ["a:b", "c d"])
    assert value(env) == ("env", {"A": "file:///x", "B": "b"})
    assert value(weights) == ("weights", {"a": 1.5})
    assert value(size) == ("to", "${part.size}/a:b")


def test_one_name_of_two_sources_is_refused_and_of_other_settings_the_later_value_holds() -> None:
    one, other = "sources.data.corpus=a/data", "sources.data.corpus=b/data"
    with pytest.raises(CommandLineError, match=f"^{one} and {other}: only one of these values"):
        read_command_line([one, "seed=1", other], Tree)
    for words in ([one, one], ["part.size=1", "part.size=2"], ["weights.a=1", "weights.a=2"]):
        read_command_line(words, Tree)
