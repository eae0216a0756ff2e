"""The tokenizer of a run as Hugging Face files, which `AutoTokenizer` loads and which give our ids.

Training puts the end-of-document token before each document, so the files of a run that was trained
here do so too.

Owns finding the one that the run was trained with, and the files beside its `tokenizer.json`.
Leaves that file itself to the data pipeline.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline import (
    DataError,
    OnCorrupt,
    ShardFolder,
    Tokenizer,
    TokenizerJson,
    tokenizer_json,
    tokenizer_named,
)
from moetrain.checks import ConfigError
from moetrain.settings import Resolved

IMPORTED = "tokenizer"
"""The folder in a run that holds the files of the tokenizer it was imported with."""
NONE = "none"
"""The message for an export without a tokenizer."""
_WAYS_OUT = f"bytes, mixtral-v1, mixtral-v3, the path of a tokenizer.json, or {NONE} to export none"


@dataclass(frozen=True, kw_only=True)
class TokenIds:
    """The ids that a model's configuration names, None where the tokenizer has none."""

    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    vocab_size: int
    begins_texts: bool = False
    """Whether the end-of-document token is put before each text."""


def write_tokenizer(
    to: Path,
    *,
    config: Resolved,
    tokenizer: str | None,
    fingerprint: str | None,
    token_ids: Mapping[str, Any] | None = None,
    run_dir: Path | None = None,
) -> TokenIds:
    """Writes the files of a run's tokenizer into a folder that is there; returns its special ids.

    `tokenizer` names it; none given: that of the shards, or the one the run was imported with,
    whose files are copied as they are. `fingerprint` is that of the one that the run was trained
    with, nothing where it wasn't trained here; `token_ids` are the special ones that the model was
    imported with, for an export without a tokenizer; `run_dir` is where a moved run is.

    Raises ConfigError where the tokenizer isn't found, or is another than the run's, and DataError
    where the one that `tokenizer` names can't be read.
    """
    run_dir = run_dir or config.run_dir
    if tokenizer == NONE:
        known = token_ids or {}
        return TokenIds(
            bos_token_id=known.get("bos_token_id"),
            eos_token_id=known.get("eos_token_id"),
            vocab_size=config.model.vocab_size,
        )
    if tokenizer is not None:
        demanded = _demanded(tokenizer, config, fingerprint)
        return _write(to, demanded, config=config, begins=bool(fingerprint))
    imported = run_dir / IMPORTED
    if not fingerprint:
        if imported.is_dir() and any(imported.iterdir()):
            return _copy(imported, to, config=config)
        raise ConfigError(
            "tokenizer",
            None,
            f"run {run_dir.name} was not trained here, and has no folder {imported} with the files "
            f"of a tokenizer: say which it has, with tokenizer={_WAYS_OUT}",
        )
    where, found, passed_over = _find(config, imported, fingerprint)
    if found is not None:
        is_imported = where == str(imported)
        return (
            _copy(imported, to, config=config)
            if is_imported
            else _write(to, found, config=config, begins=True)
        )
    raise ConfigError(
        "tokenizer",
        None,
        f"run {run_dir.name} was trained with a tokenizer of fingerprint {fingerprint[:12]}, which "
        f"isn't found ({'; '.join(passed_over)}): give it, with tokenizer={_WAYS_OUT}",
    )


def tokenizer_of_run(config: Resolved, *, fingerprint: str | None, run_dir: Path) -> Tokenizer:
    """Returns the tokenizer with the fingerprint of the one that a run was trained with.

    Without a fingerprint (it wasn't trained here), the first that is found. Raises ConfigError
    where there is none.
    """
    _, found, passed_over = _find(config, run_dir / IMPORTED, fingerprint)
    if found is None:
        raise ConfigError("run", run_dir, f"its tokenizer isn't found: {'; '.join(passed_over)}")
    return found


def _find(
    config: Resolved, imported: Path, fingerprint: str | None
) -> tuple[str, Tokenizer | None, list[str]]:
    """Returns where a run's tokenizer is, the tokenizer, and what was skipped."""
    passed_over = []
    for where, find in _places(config, imported):
        try:
            found = find()
        except (DataError, OSError) as error:
            passed_over.append(f"{where}: {error}")
            continue
        if fingerprint in (None, found.fingerprint):
            return where, found, passed_over
        passed_over.append(f"{where} has {found.name}, of fingerprint {found.fingerprint[:12]}")
    return "", None, passed_over


def _places(config: Resolved, imported: Path) -> Iterator[tuple[str, Callable[[], Tokenizer]]]:
    """Yields where a run's tokenizer may be, and what reads it."""
    data = config.data
    if (imported / "tokenizer.json").is_file():
        yield str(imported), lambda: tokenizer_named(str(imported))
    if data.dir is not None:
        location = data.dir
        yield (
            location,
            lambda: ShardFolder.open(
                location, on_corrupt=OnCorrupt.skip, cache=data.cache
            ).load_tokenizer(),
        )
    yield f"data.tokenizer={data.tokenizer}", lambda: tokenizer_named(data.tokenizer)


def _demanded(spec: str, config: Resolved, fingerprint: str | None) -> Tokenizer:
    found = tokenizer_named(spec)
    if fingerprint and found.fingerprint != fingerprint:
        raise ConfigError(
            "tokenizer",
            spec,
            f"its fingerprint is {found.fingerprint[:12]}, and the run was trained with one of "
            f"{fingerprint[:12]}: to other tokens the model means nothing: leave it out to take "
            "the shards' own, or give the one that made them",
        )
    if found.vocab_size > config.model.vocab_size:
        raise ConfigError(
            "tokenizer",
            spec,
            f"its vocabulary has {found.vocab_size}, and the model's {config.model.vocab_size} has "
            "no rows for all of them: give the model's own",
        )
    return found


def _write(to: Path, tokenizer: Tokenizer, *, config: Resolved, begins: bool) -> TokenIds:
    """Writes the files; with `begins`, they put the end-of-document token before each text."""
    spelled = tokenizer_json(tokenizer)
    if begins:
        spelled = replace(
            spelled,
            definition=_beginning_with(spelled, tokenizer.end_of_document),
            beginning=spelled.end_of_document,
        )
    special = _special_tokens(spelled)
    settings = {
        # The class that takes a tokenizer.json as it is; transformers 5 knows it by this name, too.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        # Else transformers 4 adds token_type_ids, which the model doesn't take.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": config.model.max_seq_len,
        "clean_up_tokenization_spaces": False,
        # Text that spells a special token is text, as it was in training.
        "split_special_tokens": True,
    }
    (to / "tokenizer.json").write_text(spelled.definition, encoding="utf-8")
    _write_json(to / "tokenizer_config.json", settings)
    _write_json(to / "special_tokens_map.json", special)
    ids = _ids(json.loads(spelled.definition))
    return TokenIds(
        bos_token_id=None if spelled.beginning is None else ids[spelled.beginning],
        eos_token_id=tokenizer.end_of_document,
        vocab_size=tokenizer.vocab_size,
        begins_texts=begins,
    )


def _beginning_with(spelled: TokenizerJson, id: int) -> str:
    """Returns the `tokenizer.json` with a rule that puts the end-of-document token first."""
    content, token = json.loads(spelled.definition), spelled.end_of_document
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    rule: dict[str, Any] = {
        "type": "TemplateProcessing",
        "single": [first, a],
        "pair": [first, a, first, b],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    }
    if before := content.get("post_processor"):
        rule = {"type": "Sequence", "processors": [before, rule]}
    return json.dumps(content | {"post_processor": rule}, ensure_ascii=False)


def _special_tokens(spelled: TokenizerJson) -> dict[str, str]:
    tokens = {
        "bos_token": spelled.beginning,
        "eos_token": spelled.end_of_document,
        "unk_token": spelled.unknown,
    }
    return {name: token for name, token in tokens.items() if token is not None}


def _copy(imported: Path, to: Path, *, config: Resolved) -> TokenIds:
    """Copies the files of an imported run's tokenizer; what they say of special tokens holds."""
    for path in sorted(imported.iterdir()):
        if path.is_file():
            shutil.copyfile(path, to / path.name)
    ids = _ids(_read_json(imported / "tokenizer.json"))
    settings = _read_json(imported / "tokenizer_config.json")
    named = {key: _content(settings.get(key)) for key in ("bos_token", "eos_token")}
    for id, token in (settings.get("added_tokens_decoder") or {}).items():
        ids.setdefault(_content(token) or "", int(id))
    return TokenIds(
        bos_token_id=ids.get(named["bos_token"] or ""),
        eos_token_id=ids.get(named["eos_token"] or ""),
        vocab_size=max(ids.values(), default=config.model.vocab_size - 1) + 1,
    )


def _ids(definition: dict[str, Any]) -> dict[str, int]:
    """The ids of a `tokenizer.json` by their spelling."""
    vocabulary = (definition.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # of a unigram model: pieces with their scores
        vocabulary = {piece: id for id, (piece, _) in enumerate(vocabulary)}
    added = {token["content"]: token["id"] for token in definition.get("added_tokens") or []}
    return {**vocabulary, **added}


def _content(token: Any) -> str | None:
    """The spelling of a token, which may stand alone or among its settings."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ConfigError(
            "tokenizer",
            None,
            f"{path} is damaged: {error}: say which tokenizer it is, with tokenizer={_WAYS_OUT}",
        ) from error
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
