"""Tokenizers give the ids of their origin and the text back."""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import DataError, TokenizerEntry, tokenizer_named
from data_pipeline.tokenizers.json_tokenizer import JsonTokenizer, train_bpe
from data_pipeline.tokenizers.mixtral_tokenizer import spanning_pieces, words_of
from data_pipeline.tokenizers.named import tokenizer_again, tokenizer_from
from data_pipeline.tokenizers.tokenizer import Tokenizer

TEXTS = [
    "hello",
    "  two spaces",
    "a\r\nb\n",
    "é 😀 日本",
    "def f(x):\n    return x\n",
    "</s><s>[INST]",
]
HARDER_TEXTS = [
    *["", " ", "   ", "\n", "\n\n\n", "\t", "\r", "\r\n\r\n", "\0", "a\0b", "\0 \0\n\0", "\x7f"],
    *["▁", "▁▁a", " ▁ a", "a▁b", "a ▁b▁ c", "a▁", "\n▁\n", "▁\n ▁"],
    *["a  b   c    d", "\t\tif x:\n\t\t\treturn  1\n", "x = 1   \n\n\n    y", "a \n b\n  c \n"],
    *["[INST] a [/INST]", "[REFERENCE_DOC_1]", "x[REFERENCE_DOC_12]] y", "<0x0A>", "<unk> <s>"],
    *["0123456789 3.14e-10 1,000", "²² m². ¾ Ⅷ ٣٤", "a.” «b», ‘c’. –…† “d”", "!?!?;;--->>>==="],
    *["snake_case __init__ __(a) _{x}", "don't l'été naïve", "ΑΒΓ абв עברית عربي हिन्दी ไทย"],
    *[
        "你好,世界。这是一个测试。",
        "日本語のテキスト、です。",
        "👩‍👩‍👧‍👦 🇫🇷 e\u0301 \u200b\ufeff\u2028\u00a0x",
    ],
    "The Standard bar is displayed at the top; it's available in all applications (2 of 10).",
    "La barre d'outils « Standard » s'affiche en haut ; elle n'est pas modifiée : voir « Où ? ».",
    "Die Symbolleiste „Standard“ wird oben angezeigt – größere Änderungen müssen Sie bestätigen.",
    "La barra «Estándar» se muestra en la parte superior; ¿desea añadir más? ¡Sí, mañana!",
    'La barra degli strumenti "Standard" è visualizzata in alto; perché non c\'è più? Così è.',
    "class A(B):\n    '''Doc.'''\n\n    def __init__(self, x=0x1F) -> None:\n\tself.x = f'{x!r}'",
    "a" * 5000 + " " * 3000 + "=" * 3000 + "\n" * 3000,
    "word, " * 30_000,  # several times as much as is cut into words at once
    "wordplay" * 9000 + " y",
]
ATOMS = [
    *[
        " ",
        "  ",
        "        ",
        "▁",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "\0",
        "_",
        "(",
        ")",
        ".",
        ",",
        "”",
        "²",
    ],
    *["1", "42", "the", "self", "é", "ß", "ж", "日", "😀", "\u0301", "'", "</s>", "[INST]", "[REF"],
    *["[REFERENCE_DOC_3]", "][", "--", "«", "—", "…", "†", "A", "tion", "\u00a0", "¿", "½", "٣"],
]
END = "<|endoftext|>"


@pytest.fixture(scope="module", params=["mixtral-v1", "mixtral-v3"])
def mixtral(request: pytest.FixtureRequest) -> tuple[Tokenizer, Any]:
    """A tokenizer of Mixtral's, and mistral-common's own."""
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    reference = getattr(MistralTokenizer, request.param.removeprefix("mixtral-"))()
    return tokenizer_named(request.param), reference.instruct_tokenizer.tokenizer


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


@pytest.mark.parametrize("text", TEXTS + HARDER_TEXTS, ids=lambda text: ascii(text[:20]))
def test_mixtral_ids_are_those_of_mistral_common(mixtral: tuple[Tokenizer, Any], text: str) -> None:
    ours, reference = mixtral
    assert ours.encode(text).tolist() == reference.encode(text, bos=False, eos=False)
    # Once more: the second time its words are known.
    assert ours.encode(text).tolist() == reference.encode(text, bos=False, eos=False)


def test_mixtral_ids_of_random_text_are_those_of_mistral_common(
    mixtral: tuple[Tokenizer, Any],
) -> None:
    ours, reference = mixtral
    chance = random.Random(4)
    for _ in range(3000):
        atoms = [
            chance.choice(ATOMS) if chance.random() < 0.9 else chr(chance.randrange(0xD800))
            for _ in range(chance.randrange(40))
        ]
        text = "".join(atoms)
        assert ours.encode(text).tolist() == reference.encode(text, bos=False, eos=False), atoms


def test_mixtral_ids_of_its_own_pieces_are_those_of_mistral_common(
    mixtral: tuple[Tokenizer, Any],
) -> None:
    ours, reference = mixtral
    pieces = [piece.replace("▁", " ") for piece in reference.vocab()]
    # Neighbours are joined too: a cut in the wrong place shows where two pieces meet.
    for first, second in pairwise(pieces):
        text = first + second
        assert ours.encode(text).tolist() == reference.encode(text, bos=False, eos=False)


def test_mixtral_decodes_as_mistral_common(mixtral: tuple[Tokenizer, Any]) -> None:
    ours, reference = mixtral
    ids = [1, *ours.encode("</s> été\n"), 2, 3, *ours.encode("b")]
    assert ours.decode(ids) == reference.decode([int(i) for i in ids])


def test_words_are_the_text_behind_a_space_whatever_is_cut_at_once() -> None:
    for text in HARDER_TEXTS:
        assert "".join("".join(words) for words in words_of(text)) == (" " + text if text else "")


def test_pieces_that_span_words_are_found_in_text() -> None:
    assert spanning_pieces(["▁the", "▁▁", "()", ").", "ção", "²."]) is None
    spanning = spanning_pieces(["▁the", "a.b", "x▁y", "12"])
    assert spanning is not None
    found = [bool(spanning.search(text)) for text in ("a.b", "x y", "x▁y", "112", "a b", "xy", "1")]
    assert found == [True, True, True, True, False, False, False]


def test_few_texts_are_encoded_as_a_whole_which_is_slow(mixtral: tuple[Tokenizer, Any]) -> None:
    ours, reference = mixtral
    controls = {"<unk>", *(f"<0x{byte:02X}>" for byte in range(256))}
    spanning = spanning_pieces(
        [p for p in reference.vocab() if p not in controls and not reference.is_special(p)]
    )
    if ours.name == "mixtral-v1":
        assert spanning is None
    else:
        assert spanning is not None
        assert spanning.search("[REFERENCE_DOC_7]")
        assert not any(spanning.search(text.replace("[REFERENCE", "")) for text in HARDER_TEXTS)


def test_fingerprints_differ_and_stay() -> None:
    names = ("bytes", "mixtral-v1", "mixtral-v3")
    fingerprints = {tokenizer_named(name).fingerprint for name in names}
    assert len(fingerprints) == 3
    assert fingerprints == {tokenizer_named(name).fingerprint for name in names}


def test_mixtral_fingerprint_is_the_hash_of_mistral_commons_file(
    mixtral: tuple[Tokenizer, Any],
) -> None:
    ours, reference = mixtral
    assert ours.fingerprint == hashlib.sha256(reference.file_path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mixtral-v2", r"'mixtral-v2'.*did you mean 'mixtral-v[13]'"),
        ("none", "'none' is not known"),
        ("bpe:8000", "trained on a corpus"),
        ("nowhere/tokenizer.json", r"'nowhere/tokenizer.json' doesn't exist.*bytes"),
    ],
)
def test_what_names_no_tokenizer_is_told_what_does(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenizer_named(spec)


def test_a_named_tokenizer_takes_no_other_end() -> None:
    with pytest.raises(DataError, match=r"end_of_document='</s>'.*has its own"):
        tokenizer_named("mixtral-v1", end_of_document="</s>")


def corpus() -> list[str]:
    return [text * 3 for text in TEXTS + HARDER_TEXTS if len(text) < 1000]


def test_a_trained_bpe_gives_back_any_text() -> None:
    tokenizer = JsonTokenizer("bpe:400", train_bpe(corpus(), vocab_size=400), end_of_document=0)
    assert tokenizer.vocab_size == 400
    for text in [*TEXTS, *HARDER_TEXTS, END, f"a{END}{END} b", "never seen: ĦĔĽĻŎ 🦖"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode([*ids.tolist(), 0]) == text
        assert 0 not in ids
    assert len(tokenizer.encode(TEXTS[4])) < len(TEXTS[4])


def test_a_trained_bpe_is_the_same_with_any_number_of_threads() -> None:
    program = (
        "import sys; from data_pipeline.tokenizers.json_tokenizer import train_bpe\n"
        "texts = [f'{i * 7919 % 1000} und {i ** 3} oder {i % 13}' for i in range(3000)]\n"
        "sys.stdout.write(train_bpe(texts, vocab_size=500))"
    )
    trained = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONPATH": os.getcwd()},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for threads in ("1", "3", "8")
    }
    assert len(trained) == 1


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["a b"], 256, "bpe:257 at least"),
        (["abab"], 300, r"it gives 258: use bpe:258 or fewer"),
        ([], 300, r"it gives 257: use bpe:257"),
    ],
)
def test_a_bpe_that_cannot_be_trained_says_what_can(
    texts: Iterable[str], vocab_size: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        train_bpe(texts, vocab_size=vocab_size)


def tokenizer_json(*, added: Iterable[str] = (), special: bool = True, **fields: Any) -> str:
    """The text of a `tokenizer.json` of words, `added` behind them."""
    words = ["[UNK]", "a", "b", "c"]
    tokens = [
        {
            "id": len(words) + number,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": special,
        }
        for number, content in enumerate(added)
    ]
    model = {
        "type": "WordLevel",
        "vocab": {w: i for i, w in enumerate(words)},
        "unk_token": "[UNK]",
    }
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens,
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    return json.dumps(whole | fields)


def written(folder: Path, text: str, *, config: str | None = None) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(text)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(config)
    return str(folder / "tokenizer.json")


def test_a_tokenizer_json_is_opened_by_its_path_and_its_folder(tmp_path: Path) -> None:
    path = written(tmp_path / "words", tokenizer_json(added=["<eos>"]))
    for spec in (path, str(tmp_path / "words")):
        tokenizer = tokenizer_named(spec)
        assert (tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_document) == ("words", 5, 4)
        assert tokenizer.encode("A c ?").tolist() == [1, 3, 0]  # the file lowers its letters
        assert tokenizer.decode([1, 4, 3]) == "a c"


def test_gaps_in_the_ids_count_in_the_vocabulary(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"</s>": 1, "a": 99_999}, "unk_token": "a"}
    text = tokenizer_json(model=model)
    tokenizer = tokenizer_named(written(tmp_path, text))
    assert tokenizer.vocab_size == 100_000
    assert tokenizer.encode("a").dtype == "<u4"


@pytest.mark.parametrize(
    ("config", "asked", "end"),
    [
        (None, None, "</s>"),
        ('{"eos_token": "<|im_end|>"}', None, "<|im_end|>"),
        ('{"eos_token": {"content": "<|im_end|>", "special": true}}', None, "<|im_end|>"),
        ('{"eos_token": null}', None, "</s>"),
        ('{"eos_token": "<|im_end|>"}', "c", "c"),
    ],
)
def test_what_ends_a_document(
    tmp_path: Path, config: str | None, asked: str | None, end: str
) -> None:
    text = tokenizer_json(added=["<eos>", "<|im_end|>", "</s>"])
    path = written(tmp_path, text, config=config)
    number = {"<eos>": 4, "<|im_end|>": 5, "</s>": 6, "c": 3}[end]
    assert tokenizer_named(path, end_of_document=asked).end_of_document == number


@pytest.mark.parametrize(
    ("config", "asked", "message"),
    [
        (None, None, r"has none of <\|endoftext\|>.*end_of_document=TOKEN"),
        (None, "<e>", r"end_of_document='<e>' is not in the vocabulary.*end_of_document=TOKEN"),
        ('{"eos_token": "<e>"}', None, r"tokenizer_config.json has eos_token='<e>'"),
        ("[]", None, "is no tokenizer_config.json"),
    ],
)
def test_no_end_of_document_is_told_the_way_out(
    tmp_path: Path, config: str | None, asked: str | None, message: str
) -> None:
    path = written(tmp_path, tokenizer_json(), config=config)
    with pytest.raises(DataError, match=message):
        tokenizer_named(path, end_of_document=asked)


def test_a_token_with_signs_is_named_as_a_shell_takes_it(tmp_path: Path) -> None:
    path = written(tmp_path, tokenizer_json(added=["<pad>", "<EOT>"]))
    for asked in (None, "EOT"):
        with pytest.raises(DataError, match="with end_of_document='<EOT>', or another"):
            tokenizer_named(path, end_of_document=asked)


@pytest.mark.parametrize("special", [True, False])
def test_text_that_spells_the_end_of_a_document_is_text(tmp_path: Path, special: bool) -> None:
    path = written(tmp_path, tokenizer_json(added=["</s>"], special=special))
    assert tokenizer_named(path).encode("a </s> b</s> c").tolist() == [1, 0, 0, 3]


def test_an_end_that_is_a_word_like_others_is_refused_in_text(tmp_path: Path) -> None:
    tokenizer = tokenizer_named(written(tmp_path, tokenizer_json()), end_of_document="c")
    assert tokenizer.encode("a b").tolist() == [1, 2]
    assert tokenizer.decode([1, 2, 3]) == "a b"
    with pytest.raises(DataError, match=r"spells 'c'.*end_of_document=TOKEN"):
        tokenizer.encode("a b c")


def test_nothing_is_cut_padded_or_put_around_a_document(tmp_path: Path) -> None:
    text = tokenizer_json(
        added=["<s>", "</s>"],
        truncation={
            "direction": "Right",
            "max_length": 2,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        padding={
            "strategy": {"Fixed": 8},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[UNK]",
        },
        post_processor={
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [4], "tokens": ["<s>"]}},
        },
    )
    assert tokenizer_named(written(tmp_path, text)).encode("a b c").tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "isn't JSON"),
        ("[]", "has no 'model'"),
        ('{"model": {"type": "None"}}', "can be read"),
        (tokenizer_json(added_tokens=["x"]), "can be read"),
        (tokenizer_json(model={"type": "BPE", "dropout": 0.1}), "encodes by chance.*dropout=0.1"),
    ],
)
def test_what_is_no_tokenizer_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenizer_named(written(tmp_path, text))


def test_the_fingerprint_is_of_the_tokenizer_not_of_how_it_is_written(tmp_path: Path) -> None:
    text = tokenizer_json(added=["</s>", "<eos>"])
    indented = json.dumps(json.loads(text), indent=2)
    fingerprint = tokenizer_named(written(tmp_path, text)).fingerprint
    assert tokenizer_named(written(tmp_path, indented)).fingerprint == fingerprint
    other_end = tokenizer_named(written(tmp_path, text), end_of_document="<eos>").fingerprint
    other_words = tokenizer_named(written(tmp_path, text.replace('"b"', '"B"'))).fingerprint
    assert len({fingerprint, other_end, other_words}) == 3


def entry_of(tokenizer: Tokenizer, *, file: str | None) -> TokenizerEntry:
    return TokenizerEntry(
        name=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        fingerprint=tokenizer.fingerprint,
        file=file,
    )


def test_a_tokenizer_comes_again_from_what_can_be_sent() -> None:
    trained = JsonTokenizer("bpe:300", train_bpe(corpus(), vocab_size=300), end_of_document=0)
    for tokenizer in (tokenizer_named("bytes"), tokenizer_named("mixtral-v1"), trained):
        again = tokenizer_again(
            tokenizer.name,
            definition=tokenizer.definition,
            end_of_document=tokenizer.end_of_document,
        )
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode("été\n").tolist() == tokenizer.encode("été\n").tolist()


def test_the_tokenizer_of_a_folder_is_the_one_that_made_it() -> None:
    named = tokenizer_named("mixtral-v3")
    assert tokenizer_from(entry_of(named, file=None), definition=None).name == "mixtral-v3"
    trained = JsonTokenizer("bpe:300", train_bpe(corpus(), vocab_size=300), end_of_document=0)
    entry = entry_of(trained, file="tokenizer.json")
    assert trained.definition is not None
    definition = trained.definition.encode()
    assert tokenizer_from(entry, definition=definition).fingerprint == trained.fingerprint
    changed = definition.replace(b'"!":1,"\\"":2', b'"!":2,"\\"":1')
    assert changed != definition
    with pytest.raises(DataError, match=r"tokenizer.json defines has .*build the folder again"):
        tokenizer_from(entry, definition=changed)
    with pytest.raises(DataError, match="no file that defines it"):
        tokenizer_from(entry, definition=None)
