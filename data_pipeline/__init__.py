"""Text to tokens, tokens to WebDataset shards, shards to deterministic global batches.

Knows no model and no process group: ranks are two integers, batches are numpy arrays.
"""

from data_pipeline.building.builder import (
    build_shards,
    open_folder,
    open_or_build,
    shards_or_corpus,
)
from data_pipeline.corpora.corpus import Corpus
from data_pipeline.reading.batches import Batch, GlobalBatches
from data_pipeline.reading.held_out import ValidationBatches
from data_pipeline.reading.mixture import Stage
from data_pipeline.reading.packing import PackingReport
from data_pipeline.reading.prefetch import Prefetcher
from data_pipeline.settings import (
    BuildSettings,
    DataError,
    DataSettings,
    OnCorrupt,
    Packing,
    UnavailableError,
    resolved_dir,
)
from data_pipeline.shards.index import Baselines
from data_pipeline.shards.reader import ShardFolder
from data_pipeline.storage import without_secrets
from data_pipeline.threads import sleep_when_waiting
from data_pipeline.tokenizers.named import resolved_tokenizer, tokenizer_named
from data_pipeline.tokenizers.tokenizer import Tokenizer, TokenizerEntry
from data_pipeline.tokenizers.tokenizer_json import TokenizerJson, tokenizer_json

sleep_when_waiting()  # webdataset loads torch, as a user's script may after this

__all__ = [
    "Baselines",
    "Batch",
    "BuildSettings",
    "Corpus",
    "DataError",
    "DataSettings",
    "GlobalBatches",
    "OnCorrupt",
    "Packing",
    "PackingReport",
    "Prefetcher",
    "ShardFolder",
    "Stage",
    "Tokenizer",
    "TokenizerEntry",
    "TokenizerJson",
    "UnavailableError",
    "ValidationBatches",
    "build_shards",
    "open_folder",
    "open_or_build",
    "resolved_dir",
    "resolved_tokenizer",
    "shards_or_corpus",
    "tokenizer_json",
    "tokenizer_named",
    "without_secrets",
]
