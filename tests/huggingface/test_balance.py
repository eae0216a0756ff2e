"""The balance losses of other projects, as their sources define them, against ours and its weight.

Each is written out by hand for one batch: counts and probabilities by layer and expert. The first
of docs/configuration.md's table, transformers', is compared with its own code in
test_configuration.py.
"""

import torch
import yaml
from torch import Tensor

from moetrain.model import load_balance_loss
from tests.huggingface.test_configuration import PRESETS

LAYERS, EXPERTS, TOP_K, TOKENS = 3, 5, 2, 40


def a_batch() -> tuple[Tensor, Tensor]:
    """Returns how many tokens chose an expert, and its probability, summed over tokens."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(LAYERS, TOKENS, EXPERTS, generator=generator, dtype=torch.float64)
    probabilities = logits.softmax(-1)
    chosen = probabilities.topk(TOP_K, -1).indices
    counts = torch.zeros(LAYERS, EXPERTS, dtype=torch.int64)
    counts.scatter_add_(1, chosen.flatten(1), torch.ones_like(chosen.flatten(1)))
    return counts, probabilities.sum(1)


def ours(weight: float) -> Tensor:
    """Returns what is added to a step's loss: the weight times the sum over layers."""
    counts, sums = a_batch()
    of_layers = load_balance_loss(
        counts, sums, top_k=TOP_K, counted_tokens=TOKENS, num_tokens=TOKENS
    )
    return weight * of_layers.sum()


def test_megablocks_divides_by_the_number_of_layers() -> None:
    """batched_load_balancing_loss in megablocks/layers/moe.py: one scale for all layers' sums."""
    counts, sums = a_batch()
    scale = EXPERTS * 0.01 / (LAYERS * TOKENS * TOP_K)
    theirs = scale * torch.dot(counts.flatten().double(), (sums / TOKENS).flatten())
    torch.testing.assert_close(ours(0.01 / LAYERS), theirs)


def test_megatrons_coefficient_is_our_weight() -> None:
    """switch_load_balancing_loss_func in megatron/core/transformer/moe/moe_utils.py, each layer."""
    counts, sums = a_batch()
    theirs = sum(
        (layer_sums * layer_counts).sum() * (EXPERTS * 0.01 / (TOKENS * TOKENS * TOP_K))
        for layer_counts, layer_sums in zip(counts, sums, strict=True)
    )
    torch.testing.assert_close(ours(0.01), theirs)


def test_deepseeks_alpha_is_our_weight() -> None:
    """arXiv 2401.06066, equations 12 to 14, for each layer."""
    counts, sums = a_batch()
    f = counts * EXPERTS / (TOP_K * TOKENS)
    theirs = 0.01 * (f * sums / TOKENS).sum()
    torch.testing.assert_close(ours(0.01), theirs)


def test_presets_weigh_as_their_sources_define_it() -> None:
    def of(name: str) -> tuple[dict[str, float], int, int]:
        model = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
        return model["router"], model["num_layers"], model["top_k"]

    router, layers, top_k = of("olmoe-1b-7b")  # by MegaBlocks, whose branch divides z by top_k too
    assert router["load_balance_loss_weight"] == 0.01 / layers
    assert router["z_loss_weight"] == 0.001 / (layers * top_k)
    for name in ("megablocks-xs", "megablocks-small", "megablocks-medium"):
        router, layers, _ = of(name)
        assert abs(router["load_balance_loss_weight"] * layers - 0.1) < 1e-15
    router, layers, top_k = of("qwen3-30b-a3b")  # by transformers
    assert abs(router["load_balance_loss_weight"] * layers / top_k - 0.001) < 1e-15
    assert of("deepseek-moe-16b")[0]["load_balance_loss_weight"] == 0.001
    assert of("glm-4.5-air")[0]["load_balance_loss_weight"] == 0.0001
