"""The settings of the decoder: shapes, router and experts. Frozen, typed, resolved once."""

from typing import Annotated

from pydantic import AfterValidator, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from moetrain.checks import one_of
from moetrain.kernels import BACKENDS

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RouterSettings:
    """How tokens choose experts, and what keeps the choice balanced."""

    score_function: Annotated[str, AfterValidator(one_of("softmax"))] = "softmax"
    normalize_gates: bool = True
    """Whether a token's gates sum to one, as Mixtral's do; OLMoE and top-1 models don't."""
    load_balance_loss_weight: NonNegativeFloat = 0.01
    load_balance_scope: Annotated[str, AfterValidator(one_of("global_batch", "micro_batch"))] = (
        "global_batch"
    )
    """Which tokens' expert counts the balance loss weighs the router's probabilities with."""
    z_loss_weight: NonNegativeFloat = 0.001
    bias_update_rate: NonNegativeFloat = 0.0
    """Loss-free balancing (arXiv 2408.15664): step of the selection bias; 0 turns it off."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExpertsSettings:
    """How the experts are computed."""

    backend: Annotated[str, AfterValidator(one_of(*BACKENDS))] = "auto"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelSettings:
    """Mixtral's decoder; with `num_experts` 1 it is Mistral's dense one, without a router."""

    dim: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    ffn_hidden_dim: PositiveInt
    num_experts: PositiveInt
    top_k: PositiveInt
    vocab_size: PositiveInt
    max_seq_len: PositiveInt
    rope_theta: PositiveFloat
    norm_eps: PositiveFloat = 1e-5
    loss_chunk_size: PositiveInt = 2048
    """Tokens whose logits stand in memory at once."""
    router: RouterSettings = RouterSettings()
    experts: ExpertsSettings = ExpertsSettings()

    @property
    def is_moe(self) -> bool:
        """Whether the feed-forward layers have a router and several experts."""
        return self.num_experts > 1
