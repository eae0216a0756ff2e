"""The tokenizer of `bpe:N`: trained once, on the text that is built.

Owns the choice of the training text, and that a resumed build keeps the tokenizer. Leaves the
training itself to `json_tokenizer`.
"""

import hashlib
import re
from collections.abc import Iterator

from data_pipeline.building.splits import split_of
from data_pipeline.corpora.corpus import Corpus, kept_documents
from data_pipeline.corpora.raw_documents import LeftOut
from data_pipeline.progress import ByteCounter, byte_progress
from data_pipeline.settings import BuildSettings
from data_pipeline.shards.unfinished import UnfinishedBuild
from data_pipeline.tokenizers.named import tokenizer_again
from data_pipeline.tokenizers.tokenizer import Tokenizer

# How much of each source's training split is read, from its beginning.
TRAINING_BYTES = 100_000_000


def bpe_size(settings: BuildSettings) -> int:
    """N of `tokenizer=bpe:N`; 0 for any other tokenizer."""
    bpe = re.fullmatch(r"bpe:(\d{1,9})", settings.tokenizer)
    return int(bpe[1]) if bpe else 0


def trained_tokenizer(
    unfinished: UnfinishedBuild,
    corpora: dict[str, Corpus],
    settings: BuildSettings,
    *,
    progress: bool,
) -> Tokenizer:
    """The tokenizer of `bpe:N`; raises TextChanged if it was trained on different text before."""
    # Imported here: only a build that trains needs it.
    from data_pipeline.tokenizers.json_tokenizer import train_bpe

    texts_hash = hashlib.sha256()
    num_bytes = sum(min(corpus.num_bytes, TRAINING_BYTES) for corpus in corpora.values())
    with byte_progress("training the tokenizer", num_bytes=num_bytes, shown=progress) as counter:
        texts = _training_texts(corpora, settings, texts_hash=texts_hash, counter=counter)
        definition = unfinished.trained()
        if definition is None:
            definition = train_bpe(texts, vocab_size=bpe_size(settings))
            unfinished.keep_trained(definition, texts_hash=texts_hash.hexdigest())
        else:
            for _ in texts:
                pass
            unfinished.check_trained(texts_hash=texts_hash.hexdigest())
    # The end-of-document token has the first id.
    return tokenizer_again(settings.tokenizer, definition=definition, end_of_document=0)


def _training_texts(
    corpora: dict[str, Corpus],
    settings: BuildSettings,
    *,
    texts_hash: "hashlib._Hash",
    counter: ByteCounter,
) -> Iterator[str]:
    """The beginning of each source's training split; adds the documents to `texts_hash`."""
    seen: set[bytes] = set()
    for corpus in corpora.values():
        num_bytes = 0
        for document in kept_documents(corpus.raw_documents(), left_out=LeftOut(), seen=seen):
            counter.advance(len(document.content))
            fraction = settings.validation_fraction
            if split_of(document.digest, validation_fraction=fraction) == "train":
                texts_hash.update(document.digest)
                yield document.text
                num_bytes += len(document.content)
                if num_bytes >= TRAINING_BYTES:
                    break
