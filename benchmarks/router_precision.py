"""How often a router in bfloat16 chooses other experts than the float32 one that was trained.

    python -m benchmarks.router_precision runs/toy

The routers' inputs are those of a forward pass in bfloat16 over batches of the run's text. Compared
are the sets of experts that tokens choose: with weights rounded to bfloat16 alone, and with the
product in bfloat16 as well, as transformers computes it in a model loaded as bfloat16. Prints one
JSON object; shares are of tokens, as means over the layers.
"""

import json
import os
import platform
import sys
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.commands.standard_streams import ignore_broken_pipes
from moetrain import api
from moetrain.checkpoint.chosen import chosen_checkpoint
from moetrain.checkpoint.manifest import read_manifest
from moetrain.model.router import Router
from moetrain.settings.validation import validated_run

NUM_BATCHES = 4
SEQUENCES = 8  # of each


def main() -> int:
    """Returns the exit code."""
    run_dir = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/toy")
    manifest = read_manifest(chosen_checkpoint(run_dir))
    config = validated_run(manifest.config)
    model = api.load_model(str(run_dir))
    exact = [moe.router.weight.detach().clone() for moe in model.moe_layers()]
    model.to(torch.bfloat16)
    inputs: list[list[Tensor]] = [[] for _ in exact]
    for moe, weight, seen in zip(model.moe_layers(), exact, inputs, strict=True):
        moe.router.weight.data = weight  # as in training: float32 whatever the rest is
        moe.router.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
    with torch.no_grad():
        for batch in islice(api.batches(config), NUM_BATCHES):
            model(torch.as_tensor(batch.tokens[:SEQUENCES]).long())
    rounded, multiplied = [], []
    for moe, weight, seen in zip(model.moe_layers(), exact, inputs, strict=True):
        x, low = torch.cat(seen), weight.bfloat16()
        chosen = choice(moe.router, F.linear(x.float(), weight))
        rounded.append(differing(chosen, choice(moe.router, F.linear(x.float(), low.float()))))
        multiplied.append(differing(chosen, choice(moe.router, F.linear(x, low).float())))
    figures = {
        "benchmark": "router_precision",
        "step": manifest.step,
        "tokens": len(torch.cat(inputs[0])),
        "experts": config.model.num_experts,
        "top_k": config.model.top_k,
        "weights_in_bfloat16": sum(rounded) / len(rounded),
        "product_in_bfloat16": sum(multiplied) / len(multiplied),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    print(json.dumps(figures))
    return 0


def choice(router: Router, logits: Tensor) -> Tensor:
    """Returns the experts of each token, sorted, [tokens, top_k]."""
    scores, _ = router.scores(logits)
    return router.select(router.selection_scores(logits, scores)).sort(-1).values


def differing(ours: Tensor, theirs: Tensor) -> float:
    """Returns the share of tokens with another set of experts."""
    return float((ours != theirs).any(-1).float().mean())


if __name__ == "__main__":
    ignore_broken_pipes()
    sys.exit(main())
