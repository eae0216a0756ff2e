"""Text to tokens, tokens to WebDataset shards, shards to deterministic global batches.

Independent of models and process groups: ranks are two integers, batches are numpy arrays.
"""

from data_pipeline.building.builder import build_shards
from data_pipeline.building.training_shards import (
    PlannedBuild,
    builds_shards,
    open_folder,
    open_or_build,
    opened_or_planned,
)
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

sleep_when_waiting()  # webdataset loads torch; so may a user's script afterwards

__all__ = [
    "Baselines",
    "Batch",
    "BuildSettings",
    "DataError",
    "DataSettings",
    "GlobalBatches",
    "OnCorrupt",
    "Packing",
    "PackingReport",
    "PlannedBuild",
    "Prefetcher",
    "ShardFolder",
    "Stage",
    "Tokenizer",
    "TokenizerEntry",
    "TokenizerJson",
    "UnavailableError",
    "ValidationBatches",
    "build_shards",
    "builds_shards",
    "open_folder",
    "open_or_build",
    "opened_or_planned",
    "resolved_dir",
    "resolved_tokenizer",
    "tokenizer_json",
    "tokenizer_named",
    "without_secrets",
]
