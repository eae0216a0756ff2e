"""The command, run as a user runs it, on a tiny model; and on code whose gradients are wrong."""

import json
import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain.config import resolve
from moetrain.model import Transformer
from moetrain.settings import Config
from moetrain.settings.validation import validated
from moetrain.train.micro_batch import MicroBatch
from moetrain.verify import __main__ as command
from moetrain.verify.__main__ import VerifyConfig
from moetrain.verify.routing import RoutingWatch
from moetrain.verify.tolerance import tolerances
from tests.support.runs import tiny_values, write_shards
from tests.test_config import compose_preset

ROOT = Path(__file__).parents[2]
TINY = [
    "model.dim=32", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1",
    "model.head_dim=16", "model.ffn_hidden_dim=32", "model.num_experts=4", "model.vocab_size=257",
    "train.global_batch_size=4", "train.seq_len=16", "schedule.warmup_steps=0",
    "model.router.bias_update_rate=0.001", "verify.num_steps=2", "verify.num_ranks=2",
]  # fmt: skip


def verify(
    *overrides: str, cwd: Path, code: Path = ROOT, tiny: bool = True
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moetrain.verify", *(TINY if tiny else []), *overrides],
        cwd=cwd, env=os.environ | {"PYTHONPATH": str(code)}, capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip


def rows(said: str) -> list[list[list[str]]]:
    """Returns of each pass the cells of the rows between its table's two rules."""
    bodies = said.split("─\n")[1::2]
    return [[r.split() for r in body.splitlines() if not r.startswith("─")] for body in bodies]


@pytest.mark.trap(1, 2, 3)
@pytest.mark.slow
def test_all_layouts_of_a_tiny_model_agree_in_one_table(tmp_path: Path) -> None:
    said = verify("+model=toy", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "synthetic tokens of seed 0 (data/stdlib-bytes is not built)" in said.stdout
    layouts, optimizer, dtype = rows(said.stdout)
    for results, number in ((layouts, 10), (optimizer, 2), (dtype, 3)):
        assert [row[-1] for row in results] == ["reference", *["pass"] * (number - 1)]
    assert [row[:7] for row in layouts[4:7]] == [
        ["2", "2", "2", "1", "1", "no", "as"],
        ["2", "1", "1", "2", "1", "no", "–"],
        ["2", "2", "2", "1", "1", "no", "each"],
    ]
    assert "pass      all 15 layouts train alike, and as the float64 reference" in said.stdout
    assert "covered   optimizer: 2 steps of AdamW in float32" in said.stdout
    assert "[15/15] compute dtype: 2 ranks" in said.stderr, "progress"
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"


@pytest.mark.trap(1)
@pytest.mark.slow
def test_an_expert_gradient_of_the_wrong_scale_fails_in_its_column_alone(tmp_path: Path) -> None:
    """A copy of the code divides the experts' gradients by the expert degree, as a mean would."""
    for package in ("moetrain", "launch", "data_pipeline", "conf"):
        shutil.copytree(ROOT / package, tmp_path / "code" / package)
    file = tmp_path / "code/moetrain/parallel/sharding.py"
    right, wrong = (
        "module.set_gradient_divide_factor(1.0)",
        "module.set_gradient_divide_factor(\n"
        "                float(meshes.topology.expert)\n"
        "                if type(module).__name__.endswith('Experts') else 1.0\n"
        "            )",
    )
    assert file.read_text().count(right) == 1
    file.write_text(file.read_text().replace(right, wrong))
    run = tmp_path / "run"
    run.mkdir()

    said = verify("verify.format=json", cwd=run, code=tmp_path / "code")
    assert said.returncode == 1, said.stderr
    found = json.loads(said.stdout)
    assert not found["passed"]
    assert all(part["float64_reference"] for part in found["passes"])
    spread = [r for r in found["layouts"] if r["layout"]["expert_degree"] > 1]
    assert spread
    for result in found["layouts"]:
        assert result["passed"] == (result not in spread), result["failures"]
    for result in spread:
        wrong_columns = {
            name for name, d in result["differences"].items() if d["relative"] > d["allowed"]
        }
        assert {"experts", "weights"} <= wrong_columns
        assert not {"dense", "router"} & wrong_columns
        assert result["differences"]["experts"]["relative"] >= 0.5
        assert any(f.startswith("experts: layers.") for f in result["failures"])


@pytest.mark.slow
def test_the_users_own_text_is_taken_where_it_is_built(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    masked = ("data.packing=best_fit", "data.mask_documents=true")
    said = verify(
        f"data.dir={shards}", *masked, "verify.num_ranks=1", "verify.format=json", cwd=tmp_path
    )
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    assert found["passed"]
    assert found["text"] == "text of shards"
    assert [part["name"] for part in found["passes"]] == ["layouts", "optimizer", "compute dtype"]
    assert all(part["float64_reference"] for part in found["passes"])
    assert found["not_covered"] == []
    assert len(found["layouts"]) == 3
    assert found["layouts"][1]["layout"]["num_micro_batches"] == 4
    losses = [r["losses"] for r in found["layouts"]]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(losses[0]) == 2
    # Sequences end in padding, the later the more, so that no two ranks hold equally many tokens.
    assert found["tokens_a_step"] == [16 + 14 + 12 + 10] * 2


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model=8x7b"], "46.7 B parameters"),
        (["data.dir=nowhere"], "is not a shard folder"),
        (["model.router.load_balance_scope=micro_batch"], "verify with global_batch"),
        (["train.seq_len=5000"], "use at most 1024"),
    ],
)
def test_what_cannot_be_verified_ends_with_2_and_one_message(
    capsys: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    config = validated(compose_preset(*overrides), VerifyConfig)
    assert command.verify(config) == 2
    told = capsys.readouterr()
    assert (told.out, len(told.err.splitlines())) == ("", 1)
    assert said in told.err


def test_a_mistyped_setting_names_the_nearest(tmp_path: Path) -> None:
    ended = verify("+model=toy", "verify.num_stps=3", cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "did you mean 'num_steps'" in ended.stderr


class TestRoutingWatch:
    """Near-ties fall as in the reference; what is no tie keeps its own choice, and so shows."""

    def routed(self, folder: Path, *, apart: float, rule: bool = True) -> tuple[Any, int]:
        """Returns the choices of a layout whose reference chose otherwise for two tokens.

        Experts 1 and 2 tie for every token, and the reference's rounding let the other one win.
        Its scores are the layout's, but `apart` beside the largest of a token's. Without `rule`
        it took the worst expert instead, which no rounding explains.
        """
        values = tiny_values(folder, shards=folder, train__global_batch_size=2)
        values["model"]["router"] = {}
        config = resolve(validated(values, Config), num_workers=1, now=datetime(2026, 1, 1))
        limits = tolerances(config.model, seq_len=32, num_tokens=64)
        torch.manual_seed(0)
        text = torch.randint(0, 257, (2, 33))
        batch = MicroBatch(
            tokens=text[:, :-1].contiguous(),
            targets=text[:, 1:],
            valid=torch.ones(2, 32, dtype=torch.bool),
        )

        def forward(*, writes: bool) -> tuple[list[torch.Tensor], int]:
            """Returns the choices of both layers, and how many near-ties were followed."""
            torch.manual_seed(1)
            model, chosen = Transformer(config.model), []
            for weight in model.parameters():
                torch.nn.init.normal_(weight, std=0.2)
            for moe in model.moe_layers():
                with torch.no_grad():
                    moe.router.weight[2] = moe.router.weight[1]
                moe.router.register_forward_hook(lambda _, __, found: chosen.append(found.experts))
            watch = RoutingWatch(
                seq_len=32,
                against=None if writes else folder,
                records=folder if writes else None,
                tolerance=limits.forward,
            )
            (watched,) = watch.begin(0, [batch], first_sequence=0)
            watched.through(model)
            watch.end()
            return chosen, watch.near_ties

        own, ties = forward(writes=True)
        assert ties == 0
        file = folder / "routing_0.pt"
        seen = torch.load(file, weights_only=True)
        scores, experts = seen[1]
        tied = (experts == 1) | (experts == 2)  # [tokens, top_k]
        flipped = (tied.sum(1) == 1).nonzero().flatten()[:2]
        slot = tied[flipped].int().argmax(1)
        other = 3 - experts[flipped, slot] if rule else scores.argmin(-1)[flipped]
        experts[flipped, slot] = other
        size = scores.abs().amax(-1, keepdim=True)
        if rule:
            scores[flipped, other] += 1e-6 * size[flipped, 0]
        seen[1] = (scores + apart * size, experts)
        torch.save(seen, file)
        chosen, ties = forward(writes=False)
        assert torch.equal(chosen[0], own[0])
        return (chosen[1], own[1], experts), ties

    def test_equal_scores_take_the_choice_of_the_reference(self, tmp_path: Path) -> None:
        (chosen, own, reference), ties = self.routed(tmp_path, apart=0.0)
        assert ties == 2
        assert torch.equal(chosen, reference)
        assert not torch.equal(chosen, own)

    def test_other_scores_keep_the_choice_of_the_layout(self, tmp_path: Path) -> None:
        (chosen, own, _), ties = self.routed(tmp_path, apart=1e-3)
        assert ties == 0
        assert torch.equal(chosen, own)

    def test_a_choice_that_its_scores_do_not_make_is_no_tie(self, tmp_path: Path) -> None:
        (chosen, own, reference), ties = self.routed(tmp_path, apart=0.0, rule=False)
        assert ties == 0
        assert torch.equal(chosen, own)
        assert not torch.equal(chosen, reference)
