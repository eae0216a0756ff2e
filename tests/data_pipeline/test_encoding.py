"""Documents come back as tokens in their order, whatever the number of processes."""

import json
from collections.abc import Iterator

import numpy as np
import pytest

from data_pipeline import DataError, tokenizer_named
from data_pipeline.building.encoding import Encoder
from data_pipeline.tokenizers.json_tokenizer import JsonTokenizer, train_bpe
from data_pipeline.tokenizers.tokenizer import Tokenizer

Item = tuple[int, bytes | None]


def documents() -> list[Item]:
    """Some 3 MB, so that each process has several batches; some of them were written before."""
    texts = ["", "é 😀\r\n", "long word " * 60_000, *(f"document {i} " * i for i in range(400))]
    contents = [None if i % 7 == 3 else text.encode() for i, text in enumerate(texts)]
    return [*enumerate(contents), *((i, None) for i in range(9000)), (-1, b"last")]


def trained() -> JsonTokenizer:
    text = train_bpe(["document number word " * 50], vocab_size=270)
    return JsonTokenizer("bpe:270", text, end_of_document=0)


@pytest.mark.parametrize("num_processes", [1, 3])
@pytest.mark.parametrize("tokenizer", [tokenizer_named("mixtral-v1"), trained()])
def test_every_document_comes_back_in_order(tokenizer: Tokenizer, num_processes: int) -> None:
    items = documents()
    with Encoder(tokenizer, num_processes=num_processes) as encoder:
        for _ in range(2):  # a second source, by the same processes
            encoded = list(encoder.encoded(items))
            assert [tag for tag, _ in encoded] == [tag for tag, _ in items]
            for (_, content), (_, tokens) in zip(items, encoded, strict=True):
                if content is None:
                    assert tokens is None
                    continue
                ids = tokenizer.encode(content.decode())
                assert tokens is not None
                assert tokens.dtype == ids.dtype
                assert np.array_equal(tokens, [*ids, tokenizer.end_of_document])


@pytest.mark.parametrize(("content", "limit"), [(b"word " * 20_000, 50), (None, 50_000)])
def test_documents_are_read_only_some_way_ahead(content: bytes | None, limit: int) -> None:
    num_read = 0

    def many() -> Iterator[Item]:
        nonlocal num_read
        for num_read in range(1, 4 * limit):
            yield num_read, content

    with Encoder(tokenizer_named("bytes"), num_processes=2) as encoder:
        encoded = encoder.encoded(many())
        assert [next(encoded)[0] for _ in range(5)] == [1, 2, 3, 4, 5]
        assert num_read < limit


def test_an_error_in_a_process_is_told_here() -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}
    definition = json.dumps({"version": "1.0", "added_tokens": [], "model": model})
    tokenizer = JsonTokenizer("words", definition, end_of_document=1)
    with (
        pytest.raises(DataError, match="spells 'b'"),
        Encoder(tokenizer, num_processes=2) as encoder,
    ):
        list(encoder.encoded([(0, b"a"), (1, b"b")]))
