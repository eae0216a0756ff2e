"""The settings of the decoder: shapes, router and experts. Frozen, typed, resolved once."""

from dataclasses import field
from typing import Annotated, Any

from annotated_types import Interval
from pydantic import (
    AfterValidator,
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
)
from pydantic.dataclasses import dataclass

from moetrain.checks import one_of
from moetrain.registries import EXPERT_FUNCTIONS, ROUTERS
from moetrain.settings.options import checked_options

ATTENTION_KERNELS = ("auto", "cudnn", "flash", "flash3", "efficient")
BACKENDS = ("auto", "megablocks", "grouped_mm", "cpu")
_LOSS_CHUNK_BYTES, _LOSS_CHUNK_MULTIPLE, _MAX_LOSS_CHUNK = 256 << 20, 128, 2048
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def _some_experts(number: int) -> int:
    if number < 1:
        raise ValueError(
            "there is at least one: use model.num_experts=1 model.top_k=1 for a dense model, whose "
            "layers have no router"
        )
    return number


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RouterSettings:
    """How tokens choose experts, and what keeps the choice balanced."""

    score_function: Annotated[str, AfterValidator(one_of("softmax", "sigmoid"))] = "softmax"
    """How logits become scores: softmax as in Mixtral, sigmoid as in DeepSeek-V3."""
    normalize_gates: bool = True
    """Whether a token's gates are normalised to sum to one, as in Mixtral; not in OLMoE and top-1
    models."""
    routed_scaling_factor: PositiveFloat = 1.0
    """A factor of all gates; DeepSeek-V3: 2.5, with a shared expert."""
    num_groups: PositiveInt = 1
    """Groups of neighbouring experts; a token may use experts of its `top_groups` best only. A
    group's score is its best expert's with softmax (DeepSeek-V2), and the sum of its two best
    experts' with sigmoid (DeepSeek-V3)."""
    top_groups: PositiveInt = 1
    load_balance_loss_weight: NonNegativeFloat = 0.01
    load_balance_scope: Annotated[
        str, AfterValidator(one_of("global_batch", "micro_batch", "sequence"))
    ] = "global_batch"
    """The tokens over which the balance loss balances the experts."""
    z_loss_weight: NonNegativeFloat = 0.001
    bias_update_rate: NonNegativeFloat = 0.0
    """Loss-free balancing (arXiv 2408.15664): update rate of the selection bias; 0: no updates."""
    jitter_noise: Annotated[float, Interval(ge=0.0, lt=1.0)] = 0.0
    """Training multiplies the router's input by uniform(1 - this, 1 + this) (arXiv 2101.03961)."""
    force_balance: bool = False
    """For benchmarks only: experts are chosen evenly and at random, whatever the logits."""
    name: Annotated[str, AfterValidator(ROUTERS.known)] = "top_k"
    """The router; `top_k` is what the settings above describe."""
    options: dict[str, Any] = field(default_factory=dict)
    """The settings of a router of an extension (docs/extending.md)."""

    @field_validator("options")
    @classmethod
    def _options(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return checked_options(ROUTERS, info.data.get("name"), given)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExpertsSettings:
    """How the experts are computed."""

    backend: Annotated[str, AfterValidator(one_of(*BACKENDS))] = "auto"
    recompute: bool = False
    """Whether only the experts' input is kept, and the backward pass recomputes the rest."""
    function: Annotated[str, AfterValidator(EXPERT_FUNCTIONS.known)] = "swiglu"
    """The function that experts, shared experts and dense layers compute between their matrices."""
    options: dict[str, Any] = field(default_factory=dict)
    """The settings of a function of an extension (docs/extending.md)."""

    @field_validator("options")
    @classmethod
    def _options(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return checked_options(EXPERT_FUNCTIONS, info.data.get("function"), given)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RopeScalingSettings:
    """How rotary positions reach beyond the length that a model was first trained on."""

    type: Annotated[str, AfterValidator(one_of("none", "linear", "llama3", "yarn"))] = "none"
    """`linear` divides all frequencies by `factor` (arXiv 2306.15595), `llama3` only the low ones
    (arXiv 2407.21783), `yarn` blends by wavelength and scales attention (arXiv 2309.00071)."""
    factor: Annotated[float, Interval(ge=1.0)] = 1.0
    original_max_seq_len: PositiveInt | None = None
    """The length before the scaling, of `llama3` and `yarn`."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3: wavelengths above `original_max_seq_len / low_freq_factor` are scaled in full."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3: wavelengths below `original_max_seq_len / high_freq_factor` are left alone."""
    beta_fast: PositiveFloat = 32.0
    """yarn: rotations in the original length above which a frequency is left alone."""
    beta_slow: PositiveFloat = 1.0
    """yarn: rotations in the original length below which a frequency is scaled in full."""
    attention_factor: PositiveFloat | None = None
    """yarn: a factor of queries and keys; null: 0.1 · ln(factor) + 1."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class InitSettings:
    """How initial weights are drawn: matrices from a normal; norms are one, biases zero.

    Standard deviations are those of the normal before it is cut.
    """

    std: PositiveFloat | None = None
    """null: 1/sqrt(dim), with which activations keep their scale at any width."""
    truncate_at: PositiveFloat | None = 3.0
    """Standard deviations beyond which nothing is drawn; null: the whole normal."""
    residual_scale: Annotated[str, AfterValidator(one_of("depth", "layer", "none"))] = "depth"
    """What divides the matrices that write into the residual stream: `depth`, sqrt(2 · layers)
    (GPT-2); `layer`, sqrt(2 · the layer's number from 1 on) (arXiv 2402.00838); or nothing."""
    embedding_std: PositiveFloat | None = None
    """Of the embedding, also where it is the head; null: as other matrices, as are the next two."""
    head_std: PositiveFloat | None = None
    router_std: PositiveFloat | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelSettings:
    """Mixtral's decoder; with `num_experts` 1 it is Mistral's dense one, without a router.

    `ffn_hidden_dim` is that of one expert. Shared experts are one SwiGLU layer of hidden dimension
    `num_shared_experts * ffn_hidden_dim`, which every token goes through (arXiv 2401.06066).
    """

    dim: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    ffn_hidden_dim: PositiveInt
    num_experts: Annotated[int, AfterValidator(_some_experts)]
    """1: every layer is dense."""
    top_k: PositiveInt
    vocab_size: PositiveInt
    """Rows of embedding and head: at least the tokenizer's number of ids."""
    max_seq_len: PositiveInt
    rope_theta: PositiveFloat
    rope_scaling: RopeScalingSettings = RopeScalingSettings()
    partial_rotary_factor: Annotated[float, Interval(gt=0.0, le=1.0)] = 1.0
    """The share of each head that positions rotate, from its beginning, as in GLM-4.5."""
    norm_eps: PositiveFloat = 1e-5
    pad_vocab_to_multiple_of: PositiveInt = 1
    """`vocab_size` is rounded up to a multiple of this when it is read, and nothing else depends on
    it: the added ids occur in no text, and are in the softmax like any other."""
    num_shared_experts: NonNegativeInt = 0
    num_dense_layers: NonNegativeInt = 0
    """The number of first layers that have a dense feed-forward layer and no router."""
    dense_ffn_hidden_dim: PositiveInt | None = None
    """The hidden dimension of those layers."""
    qk_norm: bool = False
    """RMSNorm of queries and keys."""
    qk_norm_scope: Annotated[str, AfterValidator(one_of("whole", "head"))] = "whole"
    """`whole`: over all of a position's queries, and over all of its keys, as in OLMoE; `head`:
    over each head, with weights that all heads share, as in Qwen3."""
    clip_qkv: PositiveFloat | None = None
    """Queries, keys and values are clamped to ± this before positions rotate them, as in OLMo."""
    attention_bias: bool = False
    """Biases of the query, key and value projections, as in Qwen2 and GLM-4.5."""
    attention_output_bias: bool = False
    """A bias of attention's output projection; with `attention_bias`, as in Llama's and Qwen3's
    `attention_bias`. Experts and feed-forward layers have no biases."""
    attention_kernel: Annotated[str, AfterValidator(one_of(*ATTENTION_KERNELS))] = "auto"
    """Of a GPU; `auto` measures which is the fastest there. A CPU has one."""
    tie_embeddings: bool = False
    """Whether the head is the embedding."""
    logit_soft_cap: PositiveFloat | None = None
    """The head's logits become cap · tanh(logits / cap), as in Gemma 2 with 30."""
    head_z_loss_weight: NonNegativeFloat = 0.0
    """Multiplies the mean squared log-sum-exp of the head's logits in the loss (arXiv 2204.02311,
    section 5: 1e-4)."""
    loss_chunk_size: PositiveInt | None = None
    """Tokens whose logits are in memory at once. None: as many as 256 MiB hold, in float32, and
    2,048 at most."""
    init: InitSettings = InitSettings()
    router: RouterSettings = RouterSettings()
    experts: ExpertsSettings = ExpertsSettings()

    def __post_init__(self) -> None:
        multiple = self.pad_vocab_to_multiple_of
        # The dataclass is frozen. A padded size, as after a resume, stays the same.
        object.__setattr__(self, "vocab_size", -(-self.vocab_size // multiple) * multiple)

    @property
    def loss_chunk(self) -> int:
        """How many tokens' logits are in memory at once."""
        if self.loss_chunk_size is not None:
            return self.loss_chunk_size
        fitting = _LOSS_CHUNK_BYTES // (4 * self.vocab_size)
        whole = fitting // _LOSS_CHUNK_MULTIPLE * _LOSS_CHUNK_MULTIPLE
        return min(_MAX_LOSS_CHUNK, max(_LOSS_CHUNK_MULTIPLE, whole))

    @property
    def is_moe(self) -> bool:
        """Whether the feed-forward layers have a router and several experts."""
        return self.num_experts > 1

    @property
    def num_moe_layers(self) -> int:
        """The number of layers with a router; they are the last ones."""
        return self.num_layers - self.num_dense_layers if self.is_moe else 0

    def dense_hidden_dim(self, layer: int) -> int | None:
        """Returns the hidden dimension of a dense layer, None for one with a router."""
        if not self.is_moe:
            return self.ffn_hidden_dim
        if layer >= self.num_dense_layers:
            return None
        assert self.dense_ffn_hidden_dim is not None, "config.check demands it"
        return self.dense_ffn_hidden_dim
