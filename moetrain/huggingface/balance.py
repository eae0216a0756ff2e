"""The balance losses of other projects in our terms, and what a config.json says of them.

Ours is the sum over the MoE layers of a loss that is 1 when a layer is balanced
(docs/configuration.md has the table).
"""

import math
from collections.abc import Mapping
from typing import Any

from moetrain.huggingface.families import MIXTRAL, Family
from moetrain.huggingface.names import ConversionError
from moetrain.settings import ModelSettings


def load_balance_loss_weight(coefficient: float, *, top_k: int, num_layers: int) -> float:
    """Returns the weight here of a `router_aux_loss_coef` there.

    Theirs multiplies one loss over the choices and probabilities of all layers together, which is
    top_k when balanced; ours the sum of a loss for each layer, 1 when balanced. The weight makes
    the two equal where all layers are alike, and so in each model of one layer. Else they are not
    the same function: pooled, layers that collapse onto different experts look balanced.
    """
    return float(f"{coefficient * top_k / num_layers:.15g}")


def router_aux_loss_coef(weight: float, *, top_k: int, num_layers: int) -> float:
    """Returns the coefficient there of a weight here: the shortest number that comes back as it."""
    exact = weight * num_layers / top_k
    for digits in (12, 17):
        short = float(f"{exact:.{digits}g}")
        if load_balance_loss_weight(short, top_k=top_k, num_layers=num_layers) == weight:
            return short
    return exact


def router_json(settings: ModelSettings, family: Family) -> dict[str, Any]:
    """Returns the keys that say how the routers are trained, as far as a family has them."""
    if not family.has_balance_loss:
        return {}
    values: dict[str, Any] = {
        "router_aux_loss_coef": router_aux_loss_coef(
            settings.router.load_balance_loss_weight,
            top_k=settings.top_k,
            num_layers=settings.num_moe_layers,
        ),
        "output_router_logits": False,
    }
    if family is MIXTRAL:
        values["router_jitter_noise"] = settings.router.jitter_noise
    return values


def read_router(
    config: Mapping[str, Any], family: Family, values: Mapping[str, Any], carried: list[str]
) -> dict[str, float]:
    """Returns how the routers are trained, where a config.json says it.

    `values` are the settings read so far; what is converted is added to `carried`.
    """
    found: dict[str, float] = {}
    if not family.has_balance_loss:
        return found
    if (coefficient := _nonnegative(config, "router_aux_loss_coef")) is not None:
        top_k, layers = values["top_k"], values["num_layers"]
        if not all(isinstance(n, int) and n > 0 for n in (top_k, layers)):
            return found  # said with the shape
        layers -= values["num_dense_layers"]
        weight = load_balance_loss_weight(coefficient, top_k=top_k, num_layers=max(1, layers))
        found["load_balance_loss_weight"] = weight
        carried.append(
            f"router_aux_loss_coef={coefficient} as model.router.load_balance_loss_weight="
            f"{weight} (times top_k={top_k}, over {layers} layers: the same where these are "
            "balanced alike)"
        )
    if family is MIXTRAL and (noise := _nonnegative(config, "router_jitter_noise")):
        if noise >= 1:
            raise ConversionError(
                f"config.json: router_jitter_noise={config['router_jitter_noise']}: must be less "
                "than 1, for the router's input is multiplied by numbers from 1 - this to 1 + this"
            )
        found["jitter_noise"] = noise
        carried.append(
            f"router_jitter_noise={noise} as model.router.jitter_noise={noise} (on the "
            "router's input alone; transformers has it on the experts' too)"
        )
    return found


def _nonnegative(config: Mapping[str, Any], name: str) -> float | None:
    value = config.get(name)
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
        raise ConversionError(f"config.json: {name}={value!r}: must be a number from 0 on")
    return float(value)
