"""The pooled loss weighs sources by the mixture, or by what of them is held out."""

from moetrain.train.validation import pooled_loss

LOSSES, TOKENS = {"en": 2.0, "code": 1.0}, {"en": 100.0, "code": 300.0}


def test_sources_count_by_their_shares_of_the_mixture() -> None:
    assert pooled_loss(LOSSES, {"en": 0.75, "code": 0.25}, TOKENS) == 1.75
    assert pooled_loss(LOSSES, {"en": 0.5, "code": 0.25, "fr": 0.25}, TOKENS) == 5 / 3


def test_a_source_that_is_not_drawn_from_counts_for_nothing() -> None:
    assert pooled_loss(LOSSES, {"en": 1.0}, TOKENS) == 2.0


def test_without_weights_tokens_count() -> None:
    assert pooled_loss(LOSSES, {}, TOKENS) == 1.25
    assert pooled_loss(LOSSES, {"fr": 1.0}, TOKENS) == 1.25
