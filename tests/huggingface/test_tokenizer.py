"""A run's tokenizer for Hugging Face: AutoTokenizer gives our ids, whatever the text."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import transformers

from data_pipeline import (
    BuildSettings,
    Tokenizer,
    build_shards,
    tokenizer_named,
)
from data_pipeline.tokenizers.json_tokenizer import train_bpe
from data_pipeline.tokenizers.mixtral_tokenizer import MixtralTokenizer
from moetrain.checks import ConfigError
from moetrain.huggingface.tokenizer import TokenIds, write_tokenizer
from moetrain.settings import Resolved
from tests.support.runs import tiny_config

HARD = [
    *["", " ", "a", "\n", "\t\t", "\r\n\r\n", "\0", "a\0b", "\x01\x1f\x7f\x80\x9f"],
    *[
        "▁",
        " ▁ ▁▁a",
        "a ▁b▁ c",
        "\n▁\n",
        "  leading",
        "trailing  ",
        "é 😀 日本",
        "👩‍👩‍👧‍👦 🇫🇷 e\u0301",
    ],
    *["\u200b\ufeff\u2028\u00a0x", "\U0010fffd\ufffd\ue000", "عربي हिन्दी ไทย עברית", "ﬁ Å Å ①"],
    *["<s>", "</s>", "a</s> <s>b", "<unk>", "<|endoftext|>", "x<|endoftext|>y", "<0x0A>", "<0xFF>"],
    *["[INST] a [/INST]", "[control_12]", "[REFERENCE_DOC_1]", "x[REFERENCE_DOC_12]] y"],
    *["[REFERENCE_DOC_3]</s>", "[REFERENCE_DOC_3]<0x0A>", "[REFERENCE_DOC_1][REFERENCE_DOC_19]"],
    *["([REFERENCE_DOC_1]", "▁[REFERENCE_DOC_2] [REFERENCE_DOC_20]", "0123456789 3.14e-10"],
    "def f(x):\n    if x:\n\t\treturn  {'a': 1}  # no\n\n\n        \n",
    *[" " * count for count in (2, 3, 14, 15, 16, 17, 29, 30, 31, 47, 250)],
    *[
        "a" + " " * count + end
        for count in (13, 14, 15, 16, 17, 33)
        for end in ("the", "=", "1", "é")
    ],
    *[mark * 700 for mark in "-=*_/#ax0\n\té日"],
]
ATOMS = [
    *[" ", "  ", " " * 15, "▁", "\n", "\n\n", "\t", "\r", "\0", "\u00a0", "_", "(", ")", "."],
    *["”", "²", "1", "42", "the", "self", "tion", "er", "ere", "é", "ß", "ж", "日", "😀"],
    *["\u0301", "'s"],
    *["[REF", "[REFERENCE_DOC_3]", "][", "--", "---", "«", "<0x41>", "[INST]", "</s>"],
    "<|endoftext|>",
]  # fmt: skip


def fuzz(*, seed: int, count: int) -> list[str]:
    """Random text: atoms that are joined in many ways, and any character but surrogates."""
    chance = random.Random(seed)

    def atom() -> str:
        if chance.random() < 0.8:
            return chance.choice(ATOMS)
        code = chance.randrange(0x110000 - 0x800)
        return chr(code if code < 0xD800 else code + 0x800)

    return ["".join(atom() for _ in range(chance.randrange(1, 30))) for _ in range(count)]


@pytest.fixture(scope="module")
def bpe_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards whose tokenizer was trained on their own text."""
    folder = tmp_path_factory.mktemp("bpe")
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(40):
        text = f"def function_{number}(x):\n    return x * {number} + é{number * 7 % 13}\n" * 12
        (corpus / f"{number}.py").write_text(text)
    settings = BuildSettings(
        corpus=str(corpus), tokenizer="bpe:300", to=str(folder / "shards"), validation_fraction=0.1
    )
    build_shards(settings, progress=False)
    return folder / "shards"


def a_run(folder: Path, *, vocab_size: int, **data: Any) -> Resolved:
    """A resolved configuration; there is no checkpoint, for none is read."""
    changes = {f"data__{key}": value for key, value in data.items()}
    return tiny_config(folder, shards=folder / "none", model__vocab_size=vocab_size, **changes)


def write_json_tokenizer(folder: Path, **changes: Any) -> Path:
    """Writes a byte-level tokenizer.json with fields changed; returns its path."""
    folder.mkdir()
    content = json.loads(train_bpe(["hello hello world", "a  b  c"] * 3, vocab_size=265))
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content | changes))
    return path


def loaded(folder: Path) -> Any:
    """What transformers makes of the files, offline."""
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def assert_same(ours: Tokenizer, theirs: Any, texts: list[str], *, trained: bool = True) -> None:
    """Equal ids, and equal text from them, with the end of a document behind it and without.

    Of a run that was trained here, texts begin as documents did, with the end of the last one.
    """
    first = [ours.end_of_document] if trained else []
    for text in texts:
        ids = ours.encode(text).tolist()
        assert theirs(text)["input_ids"] == first + ids, ascii(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, ascii(text)
        ended = [*ids, ours.end_of_document]
        assert theirs.decode(ended, skip_special_tokens=True) == ours.decode(ended), ascii(text)


@pytest.mark.parametrize("name", ["bytes", "mixtral-v1", "mixtral-v3"])
@pytest.mark.parametrize("beside_a_model", [False, True])
def test_ids_of_a_named_tokenizer_are_ours(name: str, beside_a_model: bool, tmp_path: Path) -> None:
    ours = tokenizer_named(name)
    config = a_run(tmp_path, vocab_size=ours.vocab_size, tokenizer=name)
    to = tmp_path / "to"
    to.mkdir()
    if beside_a_model:  # AutoTokenizer looks at the kind of model first
        (to / "config.json").write_text('{"model_type": "mixtral", "architectures": ["M"]}')
    ids = write_tokenizer(to, config=config, tokenizer=None, fingerprint=ours.fingerprint)
    theirs = loaded(to)
    assert_same(ours, theirs, HARD + fuzz(seed=int(beside_a_model), count=400))
    assert theirs.batch_decode([ours.encode("a b").tolist()]) == ["a b"]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ids.bos_token_id, ids.eos_token_id)
    assert theirs.model_max_length == config.model.max_seq_len
    assert theirs.chat_template is None
    assert list(theirs("a")) == theirs.model_input_names == ["input_ids", "attention_mask"]
    end = ours.end_of_document
    assert ids == TokenIds(
        bos_token_id=end, eos_token_id=end, vocab_size=ours.vocab_size, begins_texts=True
    )
    assert len(theirs) == ours.vocab_size
    assert theirs("a", "b")["input_ids"] == [end, *ours.encode("a"), end, *ours.encode("b")]


@pytest.mark.parametrize("name", ["bytes", "mixtral-v1"])
def test_a_model_that_was_not_trained_here_is_given_no_beginning(name: str, tmp_path: Path) -> None:
    ours = tokenizer_named(name)
    config = a_run(tmp_path, vocab_size=ours.vocab_size)
    ids = write_tokenizer(tmp_path, config=config, tokenizer=name, fingerprint=None)
    assert_same(ours, loaded(tmp_path), HARD[:20], trained=False)
    assert ids.bos_token_id == (None if name == "bytes" else 1)


def test_every_piece_of_mixtral_has_its_id(tmp_path: Path) -> None:
    for name in ("mixtral-v1", "mixtral-v3"):
        ours = tokenizer_named(name)
        to = tmp_path / name
        to.mkdir()
        config = a_run(tmp_path, vocab_size=ours.vocab_size)
        write_tokenizer(to, config=config, tokenizer=name, fingerprint=None)
        theirs = loaded(to)
        assert isinstance(ours, MixtralTokenizer)
        pieces = ours.pieces()
        assert theirs.convert_ids_to_tokens(range(ours.vocab_size)) == pieces
        texts = [piece.replace("▁", " ") for piece in pieces]
        assert theirs(texts)["input_ids"] == [ours.encode(text).tolist() for text in texts]
        word = pieces.index("▁the")
        for id in range(ours.vocab_size):
            if pieces[id] in ("<unk>", "<0x20>"):
                continue  # no text has them: a space has a piece of its own
            for ids in ([id, word], [word, id]):
                assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids), pieces[id]


def test_bytes_that_are_no_text_decode_alike(tmp_path: Path) -> None:
    ours = tokenizer_named("bytes")
    config = a_run(tmp_path, vocab_size=257)
    write_tokenizer(tmp_path, config=config, tokenizer="bytes", fingerprint=None)
    theirs, chance = loaded(tmp_path), random.Random(3)
    for _ in range(300):
        ids = [chance.choice([*range(257), 0xE2, 0x82, 0xAC, 0xF0, 0x9F]) for _ in range(12)]
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)


def test_a_tokenizer_of_the_shards_is_found_and_copied(bpe_shards: Path, tmp_path: Path) -> None:
    ours = tokenizer_named(str(bpe_shards))
    config = a_run(tmp_path, vocab_size=300, dir=str(bpe_shards))
    to = tmp_path / "to"
    to.mkdir()
    ids = write_tokenizer(to, config=config, tokenizer=None, fingerprint=ours.fingerprint)
    written, before = (
        json.loads((folder / "tokenizer.json").read_text()) for folder in (to, bpe_shards)
    )
    assert written.pop("post_processor")["type"] == "TemplateProcessing"
    assert before.pop("post_processor") is None
    assert written == before, "all but where a text begins"
    assert ids == TokenIds(bos_token_id=0, eos_token_id=0, vocab_size=300, begins_texts=True)
    assert_same(ours, loaded(to), HARD + fuzz(seed=2, count=300))


END = {"id": 0, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False,
       "normalized": False, "special": True}  # fmt: skip
PUTS_THE_END_FIRST = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": END["content"], "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {
        END["content"]: {"id": END["content"], "ids": [0], "tokens": [END["content"]]}
    },
}
CUTS = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
PADS = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": END["content"]}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"post_processor": PUTS_THE_END_FIRST},
        {"truncation": CUTS},
        {"padding": PADS},
        {"added_tokens": [END | {"special": False}]},
    ],
    ids=["adds a token", "cuts", "pads", "finds the end in text"],
)
def test_rules_of_a_file_that_ours_does_not_keep_to_are_left_out(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    path = write_json_tokenizer(tmp_path / "given", **changes)
    ours = tokenizer_named(str(path))
    config = a_run(tmp_path, vocab_size=ours.vocab_size)
    write_tokenizer(tmp_path, config=config, tokenizer=str(path), fingerprint=ours.fingerprint)
    assert_same(ours, loaded(tmp_path), HARD)
    rules = json.loads((tmp_path / "tokenizer.json").read_text())
    assert all(token["special"] for token in rules["added_tokens"])
    assert {rules[key] for key in ("truncation", "padding")} == {None}
    assert rules["post_processor"]["single"][0]["SpecialToken"]["id"] == "<|endoftext|>"


def test_another_tokenizer_than_the_runs_is_refused(tmp_path: Path, bpe_shards: Path) -> None:
    run = tokenizer_named("bytes").fingerprint
    config = a_run(tmp_path, vocab_size=257, dir=str(bpe_shards), tokenizer="mixtral-v1")
    with pytest.raises(
        ConfigError, match=r"tokenizer=mixtral-v3: its fingerprint is .*means nothing"
    ):
        write_tokenizer(tmp_path, config=config, tokenizer="mixtral-v3", fingerprint=run)
    with pytest.raises(
        ConfigError, match=r"isn't found .*bpe:300.*mixtral-v1.*: give it"
    ) as refused:
        write_tokenizer(tmp_path, config=config, tokenizer=None, fingerprint=run)
    assert run[:12] in str(refused.value)
    with pytest.raises(
        ConfigError, match="has 32000, and the model's 257 has no rows for all of them"
    ):
        write_tokenizer(tmp_path, config=config, tokenizer="mixtral-v1", fingerprint=None)
    assert not list(tmp_path.glob("*.json"))


def test_shards_that_are_gone_are_named_with_the_way_out(tmp_path: Path) -> None:
    config = a_run(tmp_path, vocab_size=300)
    with pytest.raises(ConfigError, match=r"none is not a shard folder.*tokenizer=bytes, mixtral"):
        write_tokenizer(tmp_path, config=config, tokenizer=None, fingerprint="0" * 64)


def test_a_run_that_was_not_trained_here_needs_its_tokenizer(tmp_path: Path) -> None:
    config = a_run(tmp_path, vocab_size=257)
    with pytest.raises(ConfigError, match=r"was not trained here.*say which it has"):
        write_tokenizer(tmp_path, config=config, tokenizer=None, fingerprint="")


def test_an_imported_runs_files_are_copied_as_they_are(tmp_path: Path) -> None:
    run_dir, to = tmp_path / "moved", tmp_path / "to"
    to.mkdir()
    run_dir.mkdir()
    path = write_json_tokenizer(run_dir / "tokenizer")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>",
                "bos_token": {"__type": "AddedToken", "content": "<|endoftext|>"},
                "chat_template": "{{ messages }}"}  # fmt: skip
    (run_dir / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    config = a_run(tmp_path, vocab_size=300)
    for fingerprint in ("", tokenizer_named(str(path)).fingerprint):
        ids = write_tokenizer(
            to, config=config, tokenizer=None, fingerprint=fingerprint, run_dir=run_dir
        )
        assert ids == TokenIds(bos_token_id=0, eos_token_id=0, vocab_size=265)
        written = {p.name: p.read_bytes() for p in to.iterdir()}
        assert written == {p.name: p.read_bytes() for p in path.parent.iterdir()}
        assert loaded(to).chat_template == "{{ messages }}"
