"""The front of every command: what a user types and writes into files, composed or refused."""

import pkgutil
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

import data_pipeline.commands.command
from data_pipeline.commands.settings_tree import is_text, paths, type_at
from data_pipeline.settings import BuildSettings
from launch.simulate.settings import SimulateSettings
from launch.submit.__main__ import SubmitConfig
from moetrain.command import Combination, config_dir, run_command
from moetrain.config import check
from moetrain.doctor.__main__ import DoctorCommand
from moetrain.export import ExportSettings
from moetrain.import_hf import ImportSettings
from moetrain.model import active_parameters
from moetrain.report.__main__ import ReportSettings
from moetrain.settings import Config
from moetrain.sweeping.combinations import CombinationLauncher
from moetrain.upcycle.__main__ import UpcycleSettings
from moetrain.verify.__main__ import VerifyConfig

Front = Callable[..., tuple[int, list[Combination[Config]], str]]


@pytest.fixture
def front(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Front:
    """Returns a function: the exit code of words, what would be trained, and what was said."""
    monkeypatch.chdir(tmp_path)

    def composed(*words: str, tree: Any = Config, module: str = "moetrain") -> Any:
        found: list[Combination[Any]] = []

        def one(config: Any) -> int:
            found.append(Combination(overrides=(), settings=config))
            return 0

        def several(combinations: list[Combination[Any]], _: Path) -> int:
            found.extend(combinations)
            return 0

        monkeypatch.setattr(sys, "argv", [module, *words])
        GlobalHydra.instance().clear()
        files = config_dir() if issubclass(tree, Config) else None
        with pytest.raises(SystemExit) as ended:
            run_command(one, tree=tree, module=module, files=files, sweep=several)
        return ended.value.code, found, capsys.readouterr().err

    return composed


def test_every_text_setting_of_every_command_takes_the_text_as_typed() -> None:
    """Also those that are added later: the types decide."""
    from data_pipeline.commands.command_line import read_command_line

    trees = [
        Config, SubmitConfig, VerifyConfig, UpcycleSettings, ReportSettings, ExportSettings,
        ImportSettings, DoctorCommand, SimulateSettings, BuildSettings,
    ]  # fmt: skip
    for tree in trees:
        texts = [path for path in paths(tree) if is_text(type_at(tree, path))]
        assert texts, tree
        words = [f"{path}=1.10" for path in texts]
        assert read_command_line(words, tree).overrides == tuple(f'{p}="1.10"' for p in texts)
    assert {"run.name", "data.dir", "checkpoint.upload_to", "observe.wandb.project"} <= set(
        path for path in paths(Config) if is_text(type_at(Config, path))
    )


def test_names_that_look_like_numbers_are_names(front: Front) -> None:
    for name in ("83e2010", "1e4000", "1.10", "true", "lr=1e-3,wd=[0.1]", "essai été", "[", "="):
        code, found, said = front(f"run.name={name}")
        assert (code, said) == (0, "")
        assert found[0].settings.run.name == name
    code, found, _ = front(
        "data.dir=1.10", "checkpoint.upload_to=file:///a=b, c", "cluster.env.X=1e5", "run.name=null"
    )
    assert code == 0
    settings = found[0].settings
    assert settings.data.dir == "1.10"
    assert settings.checkpoint.upload_to == "file:///a=b, c"
    assert settings.cluster.env == {"X": "1e5"}
    assert settings.run.name is None


@pytest.mark.parametrize(
    ("words", "num_composed"),
    [
        (["optim.lr=1e-3,2e-3", "model.num_experts=4,8", "data.dir=1.10,'a b'"], 1),
        (["model=toy,8x160m", "optim.lr=1e-3,2e-3"], 2),
        (["optim.lr=1e-3,2e-3", "model=toy,8x160m"], 4),
        (["optim.lr=1e-3,2e-3", "+cluster.env.X=1,2"], 4),
        (["run.name=null", "checkpoint.keep_every=null,500", "data.mask_documents=true,false"], 1),
        (["optim.betas=[0.9,0.95],[0.8,0.9]", "seed=1,2"], 2),
        (["optim={lr:1e-3}", "seed=1,2"], 2),
        (["optim.lr=1e-3", "optim.lr=2e-3,3e-3", "run.dir=a,b"], 1),
    ],
)
def test_combinations_of_values_are_those_that_hydra_composes(
    front: Front, monkeypatch: pytest.MonkeyPatch, words: list[str], num_composed: int
) -> None:
    times = []
    place = "hydra._internal.config_loader_impl.ConfigLoaderImpl.load_sweep_config"
    load = pkgutil.resolve_name(place)

    def counted(*given: Any, **known: Any) -> Any:
        times.append(given)
        return load(*given, **known)

    monkeypatch.setattr(place, counted)
    code, found, said = front("-m", *words)
    assert code == 0, said
    assert len(times) == num_composed
    monkeypatch.setattr(CombinationLauncher, "_same_files", lambda *_: False)
    code, expected, said = front("-m", *words)
    assert code == 0, said
    assert found == expected


def test_a_sweep_composes_each_combination_once_and_begins_none_before_the_last(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = []
    place = "hydra._internal.config_loader_impl.ConfigLoaderImpl.load_sweep_config"
    load = pkgutil.resolve_name(place)

    def counted(*given: Any, **known: Any) -> Any:
        times.append(given)
        return load(*given, **known)

    monkeypatch.setattr(place, counted)
    code, found, said = front("-m", "optim.lr=1e-3,2e-3,3e-3", "run.dir=runs")
    assert (code, len(found)) == (0, 3), said
    assert len(times) == 1, "from which the others follow: they differ in a value alone"
    times.clear()
    code, found, said = front("-m", "schedule=cosine,wsd", "optim.lr=1e-3,2e-3", "run.dir=runs")
    assert (code, len(found), len(times)) == (0, 4, 2), said
    code, found, said = front("-m", "optim.lr=1e-3,2e-3", "optim.nothing=1", "run.dir=runs")
    assert (code, found) == (2, [])
    code, found, said = front("-m", "schedule=cosine,nothing", "run.dir=runs")
    assert (code, found) == (2, [])
    assert "nothing" in said


def test_a_sweep_keeps_texts_as_typed_and_goes_with_flags_in_any_order(
    front: Front, tmp_path: Path
) -> None:
    (tmp_path / "mine/variant").mkdir(parents=True)
    (tmp_path / "mine/variant/dense.yaml").write_text(
        "# @package _global_\nmodel: {num_experts: 1, top_k: 1}\n"
    )
    code, found, said = front(
        "run.name=1.10,été", "+variant=dense", "-m", "optim.lr=1e-3,3e-3", "--config-dir", "mine"
    )
    assert (code, said) == (0, "")
    assert [c.settings.run.name for c in found] == ["1.10", "1.10", "été", "été"]
    assert {c.settings.model.num_experts for c in found} == {1}
    assert found[0].flags == ("--config-dir", "mine")
    for combination in found:  # a trial is given these words
        code, again, said = front(*combination.flags, *combination.overrides)
        assert (code, said) == (0, "")
        assert again[0].settings == combination.settings


def test_a_folder_of_hydras_search_path_goes_to_each_trial(front: Front, tmp_path: Path) -> None:
    (tmp_path / "more/variant").mkdir(parents=True)
    (tmp_path / "more/variant/small.yaml").write_text("# @package _global_\nmodel: {dim: 64}\n")
    words = (f"hydra.searchpath=[file://{tmp_path}/more]", "+variant=small", "seed=1,2", "-m")
    code, found, said = front(*words)
    assert (code, said) == (0, "")
    code, again, said = front(*found[1].flags, *found[1].overrides)
    assert (code, said) == (0, "")
    assert (again[0].settings.model.dim, again[0].settings.seed) == (64, 2)


def test_the_line_that_a_run_ends_with_goes_with_any_name(front: Front) -> None:
    for name in ("lr=1e-3,wd=[0.1]", "essai été", "83e2010"):
        code, found, said = front(f"run.name={name}", "-m", "model.num_experts=4,16")
        assert (code, said) == (0, "")
        assert [c.settings.model.num_experts for c in found] == [4, 16]
        assert {c.settings.run.name for c in found} == {name}


def test_a_group_of_ones_own_is_chosen_with_a_plus_or_without(front: Front, tmp_path: Path) -> None:
    (tmp_path / "mine/variant").mkdir(parents=True)
    (tmp_path / "mine/variant/1.10.yaml").write_text("# @package _global_\nmodel: {dim: 64}\n")
    (tmp_path / "mine/experiment").mkdir()
    (tmp_path / "mine/experiment/other.yaml").write_text(
        "# @package _global_\ndefaults: [toy, /variant: '1.10']\n"
    )
    for word in ("+variant=1.10", "variant=1.10"):
        for more in ((), ("experiment=other",), ("-m", "seed=1,2")):
            code, found, said = front("--config-dir=mine", word, *more)
            assert (code, said) == (0, "")
            assert found[0].settings.model.dim == 64


def test_the_version_is_that_of_moetrain(capsys: pytest.CaptureFixture[str], front: Front) -> None:
    code, found, said = front("--version")
    assert (code, found, said) == (0, [], "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.num_experts=8,16"], "must be one value; to run once for each of these, add -m"),
        (["optim.betas=0.9,0.95"], "type 'optim.betas=[0.9,0.95]'; to run once for each"),
        (["optim.name=adamw,sgd"], "must be one of adamw, sgd"),
        (["optim.name=adamw,sgd"], "to run once for each of these, add -m"),
        (["model=toy,8x7b"], "to run once for each of these, add -m"),
        (["optim.lr=1e-3=2"], "optim.lr=1e-3=2: must be one number: type optim.lr=NUMBER"),
        (["run.name=${x"], "begins a reference"),
        (["data.weights.1e5=1"], "reads as something else"),
        (["--confg-dir", "x"], "did you mean --config-dir?"),
        (["--config-dir", "nowhere"], "--config-dir nowhere: there is no such folder: name the"),
        (["variant=dense"], "add --config-dir FOLDER, where FOLDER/variant/dense.yaml is"),
        (["+variant=dense"], "add --config-dir FOLDER, where FOLDER/variant/dense.yaml is"),
        (["dry_run=maybe"], "dry_run=maybe: must be true or false"),
        (["optim.lr=null"], "optim.lr=null: must have a value"),
        (["model.router=3"], "model.router=3: has settings of its own"),
        (["model.dim=${model.nothere}"], "${model.nothere}: there is no such setting as"),
        (["run.name=a ${x}"], "run.name=a ${x}: there is no such setting as x"),
        (["run.name=a ${x}"], "for these signs themselves type run.name='\"a \\${x}\"'"),
        (["-m", "run.name=${x}"], "for these signs themselves type run.name='\"\\${x}\"'"),
        (["model=tyo"], "model=tyo: there is no such model (did you mean 'toy'?)"),
        (["num_experts=4"], "did you mean 'model.num_experts'?"),
    ],
)
def test_a_command_line_that_can_not_be_names_the_form_that_can(
    words: list[str], said: str, front: Front
) -> None:
    code, found, message = front(*words)
    assert (code, found) == (2, [])
    assert said in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model:\n  router:\n    z_los_weight: 1\n",
         "line 4: model.router.z_los_weight: there is no such setting (did you mean"),
        ("seed: 1\nmodle:\n  dim: 4\n", "line 3: modle: there is no such setting"),
        ("num_experts: 4\n", "line 2: num_experts: there is no such setting (did you mean 'model."),
        ("optim.lr: 0.1\n", "line 2: optim.lr: a path is for the command line: write optim: {lr: "),
        ("train:\n  num_steps: many\n", "line 3: train.num_steps=many: must be of type integer"),
        ("train:\n\tnum_steps: 3\n", "line 3: not YAML: a tab, where YAML takes spaces only"),
        ("train: [\n", "line 3: not YAML: "),
        ("train: 5\n", "x.yaml, line 2: train=5: has settings of its own: write them below it"),
        ("model:\n", "x.yaml, line 2: model: is empty: write its settings below it, indented"),
        ("model:\n  top_k: ${model.nothere}\n",
         "mine/experiment/x.yaml, line 3: model.top_k=${model.nothere}: there is no such setting"),
        ("defaults: [/variant: Moe]\n", "mine/variant/Moe.yml is not read: rename it to Moe.yaml"),
        ("seed: 1\nseed: 2\n", "line 3: not YAML: while constructing a mapping found duplicate"),
        ("- a\n", "x.yaml: is not made of lines `key: value`"),
        ("defaults: [/model: nope]\n", "x.yaml, line 2: model=nope: there is no such model; 16x7b"),
        ("defaults: [/modle: toy]\n", "x.yaml, line 2: modle=toy: there is no such"),
        ("defaults: [nope]\n", "x.yaml, line 2: "),
        ("defaults: {model: toy}\n", "experiment/x"),
        ("defaults: [/experiment: z]\n",
         "x.yaml: its defaults lead back to itself: experiment=x is chosen, and takes the place "
         "of its /experiment: z: write - z instead"),
        ("defaults: [/experiment: x]\n",
         "x.yaml: its defaults lead back to itself (experiment/x → experiment/x): take exp"),
        ("defaults: [y]\n", "(experiment/x → experiment/y → experiment/x): take experiment/y out"),
    ],
)  # fmt: skip
def test_a_file_of_ones_own_is_named_with_line_key_and_what_can_be(
    text: str, said: str, front: Front, tmp_path: Path
) -> None:
    folder = tmp_path / "mine/experiment"
    folder.mkdir(parents=True)
    (folder / "x.yaml").write_text("# @package _global_\n" + text)
    (folder / "y.yaml").write_text("# @package _global_\ndefaults: [/experiment: x]\n")
    (folder / "z.yaml").write_text("# @package _global_\ndefaults: [x]\n")
    (tmp_path / "mine/variant").mkdir()
    (tmp_path / "mine/variant/Moe.yml").write_text("# @package _global_\n")
    code, found, message = front("--config-dir", "mine", "experiment=x")
    assert (code, found) == (2, [])
    assert message.startswith("moetrain: mine/experiment/x.yaml") or "experiment/x" in message
    assert said in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("group", "text", "said"),
    [
        ("experiment", "seed: 3\n",
         "x.yaml: its settings would be those of 'experiment', which there are none of: a file of "
         "settings of several groups begins with the line # @package _global_"),
        ("variant", "model: {dim: 64}\n", "begins with the line # @package _global_"),
        ("model", "model: {dim: 64}\n", "to set model, begin the file with # @package _global_"),
        ("optim", "nam: sgd\n", "x.yaml, line 1: optim.nam: there is no such setting (did you"),
        ("optim", "# @package optim, and more\n", "Too many components"),
    ],
)  # fmt: skip
def test_a_file_that_stands_elsewhere_than_meant_is_told_its_first_line(
    group: str, text: str, said: str, front: Front, tmp_path: Path
) -> None:
    (tmp_path / "mine" / group).mkdir(parents=True)
    (tmp_path / "mine" / group / "x.yaml").write_text(text)
    experiment = ("experiment=toy",) if group == "model" else ()
    code, found, message = front("--config-dir", "mine", f"+{group}=x", *experiment)
    assert (code, found) == (2, [])
    assert f"mine/{group}/x.yaml" in message
    assert said in message


def test_files_of_other_editors_are_read_and_texts_in_them_are_texts(
    front: Front, tmp_path: Path
) -> None:
    folder = tmp_path / "mine/experiment"
    folder.mkdir(parents=True)
    (folder / "x.yaml").write_bytes(
        b"\xef\xbb\xbf# Of mine.\r\n# @package _global_\r\n"
        b"defaults: [toy]\r\n"
        b"run: {name: 1.10}\r\ncluster: {env: {X: 1e5, Y: on, Z: '2'}}\r\n"
        b"data: {weights: {2024: 1, 007: 2}, corpus: 83e2010}\r\nlaunch: {pass_env: [1.0, A]}\r\n"
        b"checkpoint: {upload_to: null}\r\noptim: {lr: 1e-3}\r\n"
    )
    code, found, said = front("--config-dir", "mine", "experiment=x")
    assert (code, said) == (0, "")
    settings = found[0].settings
    assert settings.run.name == "1.10"
    assert settings.cluster.env == {"X": "1e5", "Y": "on", "Z": "2"}
    assert settings.data.weights == {"2024": 1.0, "007": 2.0}
    assert settings.data.corpus == "83e2010"
    assert settings.launch.pass_env == ["1.0", "A"]
    assert settings.checkpoint.upload_to is None
    assert settings.optim.lr == 1e-3
    (folder / "x.yaml").write_bytes("# @package _global_\nseed: 1 # é\n".encode("latin-1"))
    code, _, said = front("--config-dir", "mine", "experiment=x")
    assert (code, "is not text in UTF-8" in said) == (2, True)


def test_commands_of_the_data_pipeline_read_files_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/book").mkdir(parents=True)
    module = "data_pipeline.build"

    def built(text: str) -> tuple[int, list[BuildSettings], str]:
        (tmp_path / "mine/book/x.yaml").write_text(text)
        words = ["to=out", "--config-dir", "mine", "tokenizer=bytes", "+book=x"]
        monkeypatch.setattr(sys, "argv", [module, *words])
        GlobalHydra.instance().clear()
        found: list[BuildSettings] = []
        code = 0
        try:
            data_pipeline.commands.command.run_command(
                found.append, settings_type=BuildSettings, module=module, about=""
            )
        except SystemExit as ended:
            code = int(str(ended.code))
        return code, found, capsys.readouterr().err

    code, found, said = built("# @package _global_\nsources: {1e5: {corpus: a, licence: 1.10}}\n")
    assert (code, said) == (0, "")
    assert found[0].sources["1e5"].licence == "1.10"
    code, _, said = built("# @package _global_\nsources:\n  a:\n    copus: x\n")
    assert code == 2
    assert "mine/book/x.yaml, line 4: sources.a.copus: there is no such setting" in said
    assert "did you mean 'corpus'?" in said
    code, _, said = built("corpus: x\n")
    assert (code, "# @package _global_" in said) == (2, True)


def test_the_variants_of_the_documentation_compose_as_they_stand_there(
    front: Front, tmp_path: Path
) -> None:
    page = (Path(__file__).parents[1] / "docs/configuration.md").read_text()
    section = page.partition("## Variants")[2].partition("\n## ")[0]
    shown = r"^`(my_conf/[\w/-]+\.yaml)`.*?\n```yaml\n(.*?)```"
    files = re.findall(shown, section, re.DOTALL | re.MULTILINE)
    assert len(files) == section.count("```yaml") == 4
    for name, text in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    commands = re.findall(r"^moetrain train (.*)$", section, re.M)
    assert len(commands) == 4
    composed: dict[str, list[Config]] = {}
    for command in commands:
        code, found, said = front(*shlex.split(command))
        assert (code, said) == (0, ""), command
        for combination in found:
            check(combination.settings)
        composed[command] = [combination.settings for combination in found]
    dense, moe, top1 = (composed[commands[1]][i].model for i in (1, 0, 2))
    assert dense == composed[commands[0]][0].model
    assert active_parameters(moe) == active_parameters(top1) + moe.dim * moe.num_layers * 4
    routers = moe.dim * moe.num_layers * moe.num_experts
    assert active_parameters(dense) == active_parameters(moe) - routers
    assert len(composed[commands[2]]) == 4
