"""Models and layouts whose parts have uneven sizes, for tests of checkpoints."""

import dataclasses

from moetrain.settings import ModelSettings, RouterSettings

# 257 tokens and 20 dimensions: no world but one divides the first, and 3 and 6 not the second.
MIXTRAL = ModelSettings(
    dim=20, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=10, ffn_hidden_dim=24,
    num_experts=4, top_k=2, vocab_size=257, max_seq_len=32, rope_theta=1e4,
    router=RouterSettings(bias_update_rate=0.01),
)  # fmt: skip
# A dense first layer, shared experts, norms and biases of queries and keys, tied embeddings.
DEEPSEEK = dataclasses.replace(
    MIXTRAL, num_experts=6, num_shared_experts=1, num_dense_layers=1, dense_ffn_hidden_dim=40,
    qk_norm=True, attention_bias=True, attention_output_bias=True, tie_embeddings=True,
)  # fmt: skip
DENSE = dataclasses.replace(MIXTRAL, num_experts=1, top_k=1)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Degrees of parallelism over `world` ranks."""

    world: int
    expert: int = 1
    replicate: int = 1

    def __str__(self) -> str:
        shard = self.world // self.replicate
        return f"replicate{self.replicate}-shard{shard}-expert{self.expert}"
