"""Tokenizers give the ids of their origin and the text back."""

import pytest

from data_pipeline import DataError, tokenizer_named

TEXTS = [
    "hello",
    "  two spaces",
    "a\r\nb\n",
    "é 😀 日本",
    "def f(x):\n    return x\n",
    "</s><s>[INST]",
]


@pytest.mark.parametrize("name", ["bytes", "mixtral-v1", "mixtral-v3"])
@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(name: str, text: str) -> None:
    tokenizer = tokenizer_named(name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.max() < tokenizer.vocab_size
    assert tokenizer.end_of_document not in ids
    assert tokenizer.decode([*ids.tolist(), tokenizer.end_of_document]) == text


@pytest.mark.parametrize(
    ("name", "vocab_size", "end"),
    [("bytes", 257, 256), ("mixtral-v1", 32_000, 2), ("mixtral-v3", 32_768, 2)],
)
def test_vocabulary(name: str, vocab_size: int, end: int) -> None:
    tokenizer = tokenizer_named(name)
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (vocab_size, end)


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_mixtral_ids_are_those_of_mistral_common(version: str) -> None:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    reference = getattr(MistralTokenizer, version)().instruct_tokenizer.tokenizer
    tokenizer = tokenizer_named(f"mixtral-{version}")
    for text in TEXTS:
        assert tokenizer.encode(text).tolist() == reference.encode(text, bos=False, eos=False)


def test_fingerprints_differ_and_stay() -> None:
    names = ("bytes", "mixtral-v1", "mixtral-v3")
    fingerprints = {tokenizer_named(name).fingerprint for name in names}
    assert len(fingerprints) == 3
    assert fingerprints == {tokenizer_named(name).fingerprint for name in names}


def test_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(DataError, match=r"'mixtral-v2'.*did you mean 'mixtral-v[13]'"):
        tokenizer_named("mixtral-v2")
