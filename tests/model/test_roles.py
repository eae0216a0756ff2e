"""Every parameter has one role, by its name."""

import pytest
import torch

from moetrain.model import Transformer
from moetrain.model.roles import Role, role_of
from moetrain.settings import ModelSettings

SETTINGS = ModelSettings(
    dim=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, ffn_hidden_dim=8, num_experts=4,
    top_k=2, vocab_size=32, max_seq_len=8, rope_theta=1e4, num_shared_experts=1,
    num_dense_layers=1, dense_ffn_hidden_dim=8, qk_norm=True, attention_bias=True,
    attention_output_bias=True,
)  # fmt: skip


def test_roles_are_those_of_the_modules() -> None:
    with torch.device("meta"):
        model = Transformer(SETTINGS)
    found: dict[Role, int] = {}
    for name, parameter in model.named_parameters():
        found[role_of(name)] = found.get(role_of(name), 0) + parameter.numel()
    dim, hidden, heads, kv = 8, 8, 8, 4
    assert found == {
        Role.embedding: 32 * dim,
        Role.head: 32 * dim,
        Role.norm: 2 * (2 * dim + heads + kv) + dim,
        Role.attention: 2 * (2 * dim * heads + 2 * dim * kv + heads + 2 * kv + dim),
        Role.dense: 3 * dim * hidden,
        Role.router: 4 * dim,
        Role.experts: 4 * 3 * dim * hidden,
        Role.shared_experts: 3 * dim * hidden,
    }


def test_a_name_without_a_role_is_named() -> None:
    with pytest.raises(ValueError, match=r"adapter\.weight belongs to none of embedding"):
        role_of("adapter.weight")
