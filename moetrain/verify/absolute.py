"""The float64 reference as a trial: the same batches, rates and records, by its own arithmetic."""

import torch
from torch import Tensor

from moetrain.settings import OptimSettings, ScheduleSettings
from moetrain.verify import records
from moetrain.verify.ranks import Tell
from moetrain.verify.records import GRADIENTS, REPORTS, Tensors, Update
from moetrain.verify.reference.optimizers import rate
from moetrain.verify.reference.training import Reference
from moetrain.verify.trial import Trial, read_batch


def run_reference(trial: Trial, tell: Tell) -> None:
    """Trains the reference and writes its records, for the layout of one rank to compare with."""
    assert trial.records is not None
    config = trial.config
    reference = Reference(
        config.model, config.optim, seed=config.seed, mask_documents=config.data.mask_documents
    )
    figures: list[Tensors] = []
    decay, updates, before = 1.0, 0, _weights(reference)
    for step, lr in enumerate(trial.rates):
        tell(step)
        skipped = step == trial.skipped_step
        seen: dict[int, list[tuple[Tensor, Tensor]]] = {}

        def watch(
            _: int,
            layer: int,
            scores: Tensor,
            own: Tensor,
            seen: dict[int, list[tuple[Tensor, Tensor]]] = seen,
        ) -> Tensor:
            seen.setdefault(layer, []).append((scores.detach().clone(), own.clone()))
            return own

        found = reference.step(
            read_batch(trial.batches, step),
            first_sample=step * config.train.global_batch_size,
            lr=lr,
            skipped=skipped,
            watch=watch,
        )
        whole = {
            layer: tuple(torch.cat(part) for part in zip(*pieces, strict=True))
            for layer, pieces in seen.items()
        }
        torch.save(whole, trial.records / records.routing_file(step))
        if step == 0:
            torch.save(found.gradients, trial.records / GRADIENTS)
        extra = {} if skipped else {"grad_norm": found.gradient_norm}
        extra |= {"skipped": float(skipped)}
        figures.append(
            found.figures | {n: torch.tensor(v, dtype=torch.float64) for n, v in extra.items()}
        )
        if not skipped:
            decay *= 1 - lr * config.optim.weight_decay
            updates += 1
        update = Update(
            before=before,
            weights=_weights(reference),
            decay=decay,
            state=_state(reference),
            updates=updates,
        )
        records.write_update(
            *(trial.records, step, update),
            optim=config.optim,
            lr=0.0 if skipped else lr,
            tolerances=trial.tolerances,
        )
        if not trial.grows:
            before, decay = update.weights, 1.0
    torch.save(figures, trial.records / REPORTS)


def _weights(reference: Reference) -> Tensors:
    """Returns the weights as float32: layouts that begin a step from them have the same bits."""
    return {n: t.detach().float() for n, t in (reference.weights | reference.biases).items()}


def _state(reference: Reference) -> dict[str, Tensors]:
    """Returns the optimizer's tensors under torch's names."""
    optimizer = reference.optimizer
    if not optimizer.first:
        return {}
    first = {name: tensor.clone() for name, tensor in optimizer.first.items()}
    if optimizer.settings.name == "sgd":
        return {"momentum_buffer": first}
    count = torch.tensor(float(optimizer.num_updates))
    return {
        "exp_avg": first,
        "exp_avg_sq": {name: tensor.clone() for name, tensor in optimizer.second.items()},
        "step": dict.fromkeys(first, count),
    }


def reference_rates(
    steps: tuple[int, ...], *, optim: OptimSettings, schedule: ScheduleSettings, num_steps: int
) -> tuple[float, ...] | None:
    """Returns the reference's own rates of steps; None for a schedule of an extension."""
    found = [rate(s, peak=optim.lr, num_steps=num_steps, settings=schedule) for s in steps]
    return None if None in found else tuple(r for r in found if r is not None)
