"""transformers' models as oracles: the class that an export names, its weights copied over."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from moetrain.huggingface.configuration import config_json
from moetrain.model import Transformer
from moetrain.settings import ModelSettings

NAMES = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
PARTS = {
    "self_attn": "attention",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feed_forward_norm",
    "mlp.gate.weight": "feed_forward.router.weight",
    "mlp.gate.e_score_correction_bias": "feed_forward.router.bias",
    "mlp.shared_expert.": "feed_forward.shared_experts.",
    "mlp": "feed_forward",
}


def oracle_for(settings: ModelSettings) -> nn.Module:
    """Returns transformers' model of these settings, its weights drawn from torch's generator."""
    values = config_json(settings, dtype="float32", bos_token_id=None, eos_token_id=None)
    config = AutoConfig.for_model(**values)
    model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    assert type(model).__name__ == values["architectures"][0]
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("shared_expert_gate.weight"):
            nn.init.zeros_(weight)  # ours has no such gate: half of the output
        elif name.endswith("gate.weight"):  # a spread that makes the choice of experts matter
            nn.init.normal_(weight)
        elif name.endswith("e_score_correction_bias"):
            nn.init.normal_(weight, std=0.2)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            nn.init.uniform_(weight, 0.5, 2.0)
        elif name.endswith("_proj.bias"):
            nn.init.normal_(weight, std=0.1)
    return model.eval()


@torch.no_grad()
def copy_weights(oracle: nn.Module, model: Transformer, *, gradients: bool = False) -> None:
    """Copies every weight of the oracle; a weight left over on either side is an error.

    With `gradients`, the oracle holds gradients in the place of its weights.
    """
    weights = {}
    buffers = [b for b in oracle.named_buffers() if b[0].endswith("e_score_correction_bias")]
    for name, weight in [*oracle.named_parameters(), *buffers]:
        if "shared_expert" in name and not weight.numel():
            continue  # transformers makes a layer without a dimension
        if name.endswith("shared_expert_gate.weight"):
            continue
        if name.endswith("shared_expert.down_proj.weight"):
            # The gate of zeros halves it: theirs is twice ours, and its gradient half of ours.
            weight = weight * 2 if gradients else weight / 2
        ours = NAMES.get(name, name.removeprefix("model."))
        for theirs, part in PARTS.items():
            ours = ours.replace(f".{theirs}", f".{part}")
        if ours.endswith("experts.gate_up_proj"):
            gate, up = weight.chunk(2, dim=1)
            stem = ours.removesuffix("gate_up_proj")
            weights[f"{stem}gate"], weights[f"{stem}up"] = gate, up
        elif ours.endswith("experts.down_proj"):
            weights[ours.removesuffix("_proj")] = weight.transpose(1, 2)
        else:
            weights[ours] = weight
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("router.bias") for name in missing)
