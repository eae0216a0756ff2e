"""A user's own package, outside the repository: one thing of each kind."""

from pathlib import Path

SOURCE = '''
"""Registers one thing of each kind."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from moetrain import extensions as ext


@dataclass
class RouterOptions:
    temperature: float = 1.0
    own_loss: float = 0.1


@ext.register_router("lab_noisy", options=RouterOptions)
class Noisy(ext.Router):
    """Learned scale, noise of its own, a loss of its own."""

    draws_noise = True

    def __init__(self, settings):
        super().__init__(settings)
        self.scale = nn.Parameter(torch.empty(1))
        self.offset = nn.Parameter(torch.empty(settings.dim, settings.num_experts))

    def logits(self, x, choice):
        logits = super().logits(x, choice) + x @ self.offset.float()
        logits = logits * self.scale.float() / self.options.temperature
        if choice.noise_seeds is None:
            return logits
        size = len(x) // len(choice.noise_seeds)
        noise = [
            torch.randn(size, self.num_experts, generator=torch.Generator().manual_seed(seed))
            for seed in choice.noise_seeds
        ]
        return logits + 0.1 * torch.cat(noise)

    def own_loss(self, logits, experts):
        return self.options.own_loss * logits.square().mean(-1)


@ext.register_router("lab_of_batch")
class OfBatch(ext.Router):
    """Not exact: what it says of a token depends on the tokens beside it."""

    def logits(self, x, choice):
        logits = super().logits(x, choice)
        return logits - logits.mean(0)


@ext.register_expert_function("lab_relu2")
class SquaredReLU(ext.ExpertFunction):
    gated = False

    def __call__(self, up, gate):
        assert gate is None
        return F.relu(up).square()


@ext.register_expert_function("lab_swiglu")
class SameAsBuiltIn(ext.ExpertFunction):
    def __call__(self, up, gate):
        return F.silu(gate) * up


@dataclass
class LionOptions:
    beta1: float = 0.9
    beta2: float = 0.99


class Lion(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault(
                    "momentum", torch.zeros_like(parameter)
                )
                update = momentum.lerp(parameter.grad, 1 - group["beta1"]).sign_()
                parameter.sub_(update * group["lr"])
                momentum.lerp_(parameter.grad, 1 - group["beta2"])


@ext.register_optimizer("lab_lion", options=LionOptions)
def lion(groups, settings, options):
    return Lion(groups, {"lr": settings.lr, **vars(options)})


@ext.register_schedule("lab_linear")
def linear(step, num_steps, settings, options):
    return 1 - (1 - settings.final_lr_ratio) * step / (num_steps - 1)


@ext.register_objective("lab_plain")
class Plain(ext.Objective):
    """Cross-entropy and the routers' own loss, without balance and z losses."""

    def begin(self, micro_batches, *, model, meshes, num_tokens):
        def loss(output, batch):
            return (output.cross_entropy + output.routing.own_loss_sum.sum()) / num_tokens

        return loss


@ext.register_metric("lab_metric")
class LabMetric(ext.Metric):
    """The routers' entropy, which the record has as well, and tokens: exact in any layout."""

    def sums(self, output, batch, model):
        return torch.cat([output.routing.entropy_sum, batch.valid.sum()[None]])

    def values(self, sums, report, model):
        *layers, tokens = sums.tolist()
        return {"lab/entropy": sum(layers) / len(layers) / tokens, "lab/tokens": tokens}


@dataclass
class CountOptions:
    start: int = 0


@ext.register_callback("lab_count", options=CountOptions)
class Count(ext.Callback):
    """Writes down, on each rank, what it was called for."""

    def __init__(self, options):
        super().__init__(options)
        self.steps = options.start

    def _tell(self, trainer, what):
        path = trainer.config.run_dir / f"lab_{trainer.place.rank}.txt"
        with path.open("a") as file:
            file.write(f"{what} {trainer.state.step} {self.steps}\\n")

    def run_start(self, trainer):
        self._tell(trainer, "start")

    def step_end(self, trainer, report):
        self.steps += 1

    def validation_end(self, trainer, metrics):
        assert metrics["validation/loss"] > 0
        self._tell(trainer, "validation")

    def checkpoint(self, trainer):
        self._tell(trainer, "checkpoint")

    def run_end(self, trainer, outcome):
        self._tell(trainer, f"end finished={outcome.finished}")

    def state(self):
        return {"steps": self.steps}

    def restore(self, state):
        self.steps = state["steps"]


@dataclass
class LinesOptions:
    fails_at: int = -1


@ext.register_sink("lab_lines", options=LinesOptions)
class Lines(ext.Sink):
    def __init__(self, options, *, run_dir, config, resume_step):
        self.options, self.path = options, run_dir / "lab_lines.txt"
        self._line(f"resumes {resume_step} seed {config['seed']}")

    def _line(self, text):
        with self.path.open("a") as file:
            file.write(text + "\\n")

    def write(self, record):
        if record["step"] == self.options.fails_at:
            raise OSError("no space")
        self._line(f"step {record['step']}")

    def close(self, exit_code):
        self._line(f"closed {exit_code}")
'''


def write_lab(folder: Path) -> Path:
    """Writes the package `my_lab` and what an installer writes beside it; returns the folder."""
    package = folder / "my_lab"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from my_lab import things\n")
    (package / "things.py").write_text(SOURCE)
    info = folder / "my_lab-0.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-lab\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text("[moetrain.extensions]\nlab = my_lab\n")
    (info / "top_level.txt").write_text("my_lab\n")
    return folder
