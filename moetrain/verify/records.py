"""What a run writes for others to compare with: its files, and how each part is measured.

A folder of records has the gradients of the first step, the reports of all steps, the routing of
each, and weights and optimizer state after some steps.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain.settings import OptimSettings
from moetrain.verify.comparison import KINDS, Difference, difference, kind_of, norm, parts, worst
from moetrain.verify.tolerance import EPS, AdamErrors, Tolerances

GRADIENTS, REPORTS = "gradients.pt", "reports.pt"
Tensors = dict[str, Tensor]


def routing_file(step: int) -> str:
    """Returns the name of the file with a step's routing scores and choices."""
    return f"routing_{step}.pt"


def after_file(step: int) -> str:
    """Returns the name of the file with weights and state after a step."""
    return f"after_{step}.pt"


def load(folder: Path, name: str) -> Any:
    """Returns what a file of records holds."""
    return torch.load(folder / name, mmap=True, weights_only=True)


@dataclass(frozen=True, kw_only=True)
class Update:
    """Weights and state after a step, and those that it began from."""

    before: Tensors
    weights: Tensors
    """Parameters and selection biases."""
    decay: float
    """What matrices keep of themselves without a gradient: the product of 1 - lr · weight_decay."""
    state: dict[str, Tensors] = field(default_factory=dict)
    """The optimizer's tensors, by key and parameter."""
    updates: int = 0
    """Updates of the optimizer so far."""


def write_update(
    folder: Path,
    step: int,
    update: Update,
    *,
    optim: OptimSettings,
    lr: float,
    tolerances: Tolerances,
) -> None:
    """Writes what others compare with, and by how much each part moved through gradients."""
    moved = {}
    for name, weight in update.weights.items():
        keeps = update.decay if weight.ndim > 1 else 1.0
        pairs = zip(parts(name, weight), parts(name, update.before[name]), strict=True)
        for (where, now), (_, before) in pairs:
            moved[where] = norm(now.double() - keeps * before.double())
    record: dict[str, Any] = {
        "weights": update.weights, "moved": moved, "decays": update.decay != 1.0,
        "state": update.state, "updates": update.updates, "errors": {},
    }  # fmt: skip
    if optim.name == "adamw" and update.updates:
        errors = AdamErrors(settings=optim, updates=update.updates, gradient=tolerances.gradient)
        record["errors"] = _adam_errors(update.state, errors, lr=lr)
    torch.save(record, folder / after_file(step))


def _adam_errors(
    state: dict[str, Tensors], errors: AdamErrors, *, lr: float
) -> dict[str, tuple[float, float, float]]:
    """Returns of each part what update, first and root of second moment may be off by."""
    means, squares = state["exp_avg"], state["exp_avg_sq"]
    total = math.sqrt(sum(float(v.double().sum()) for v in squares.values()))
    found = {}
    for name, mean in means.items():
        for (where, m), (_, v) in zip(parts(name, mean), parts(name, squares[name]), strict=True):
            found[where] = errors.of(m, v, lr=lr, total=total)
    return found


def compare_weights(
    weights: Tensors, theirs: dict[str, Any], *, steps: int, tolerances: Tolerances, note: str
) -> list[Difference]:
    """Returns how far weights are apart, beside how far gradients moved them."""
    found = []
    for name, weight in weights.items():
        decays = theirs["decays"] and weight.ndim > 1
        pairs = zip(parts(name, weight), parts(name, theirs["weights"][name]), strict=True)
        for (where, ours), (_, there) in pairs:
            size, moved = norm(there), theirs["moved"][where]
            allowed = tolerances.weights(steps=steps, size=size, moved=moved, decays=decays)
            if where in theirs["errors"]:
                allowed = theirs["errors"][where][0] + steps * EPS * size
            scale = moved or size or 1.0
            found.append(
                difference(where + note, ours, there, allowed=allowed / scale, scale=scale)
            )
    return found


def compare_state(
    state: dict[str, Tensors], theirs: dict[str, Any], *, tolerances: Tolerances, note: str
) -> list[Difference]:
    """Returns how far the optimizer's tensors are apart, the second moment by its root."""
    found = []
    for key, tensors in state.items():
        total = math.hypot(*(norm(t) for t in theirs["state"][key].values()))
        for name, tensor in tensors.items():
            there = theirs["state"][key][name]
            if tensor.ndim == 0:
                found.append(difference(f"{key} of {name}{note}", tensor, there, allowed=0.0))
                continue
            for (where, ours), (_, other) in zip(
                parts(name, tensor), parts(name, there), strict=True
            ):
                if key == "exp_avg_sq":
                    ours, other = ours.double().sqrt(), other.double().sqrt()
                size = norm(other)
                # SGD's buffer is a sum of as many gradients.
                allowed = theirs["updates"] * tolerances.gradients(size=size, total=total)
                if where in theirs["errors"] and size:
                    which = {"exp_avg": 1, "exp_avg_sq": 2}[key]
                    allowed = theirs["errors"][where][which] / size
                found.append(difference(f"{key} of {where}{note}", ours, other, allowed=allowed))
    return found


def compare_gradients(
    gradients: Tensors, reference: Tensors, *, tolerances: Tolerances
) -> dict[str, Difference | None]:
    """Returns the worst difference of each kind's gradients."""
    found: dict[str, list[Difference]] = {kind: [] for kind in KINDS}
    total = math.hypot(*(norm(gradient) for gradient in reference.values()))
    for name, gradient in gradients.items():
        pairs = zip(parts(name, gradient), parts(name, reference[name]), strict=True)
        for (where, ours), (_, theirs) in pairs:
            allowed = tolerances.gradients(size=norm(theirs), total=total)
            found[kind_of(name)].append(difference(where, ours, theirs, allowed=allowed))
    return {kind: worst(differences) for kind, differences in found.items()}


def compare_reports(
    figures: list[Tensors], reference: list[Tensors], *, tolerances: Tolerances, grows: bool
) -> dict[str, Difference | None]:
    """Returns the worst difference of the losses, counts and entropies, and that of the norms.

    `grows`: each step begins from weights that are further apart.
    """
    found: dict[str, list[Difference]] = {"loss": [], "grad_norm": []}
    # The dtype pass compares one step with a reference that took more.
    for step, (ours, theirs) in enumerate(zip(figures, reference, strict=False)):
        for name in ours.keys() & theirs.keys():
            is_norm = name.startswith("grad_norm")
            limit = tolerances.forward
            if is_norm:
                limit = tolerances.gradient if tolerances.norm is None else tolerances.norm
            found["grad_norm" if is_norm else "loss"].append(
                difference(
                    f"{name} of step {step + 1}",
                    ours[name],
                    theirs[name],
                    allowed=limit * (step + 1 if grows else 1),
                )
            )
    return {column: worst(differences) for column, differences in found.items()}
