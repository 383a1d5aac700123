"""The trained tokenizer: exact size, lossless on any text, the families' chat formats, and which tokens are answers."""

import random
from pathlib import Path

import pytest

from megatron_tower.config import InputError
from megatron_tower.data import chat, templates, tokenizer

TEXTS = [f"Seite {i} speichern und {w} öffnen" for i in range(400) for w in ("page", "élève", "мир", "日本語")]
SIZES = {"gemma2": 350, "qwen2": 351}


@pytest.fixture(scope="module", params=["gemma2", "qwen2"])
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, "tokenizer.PreTrainedTokenizerFast", Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, tokenizer.train(TEXTS, request.param, SIZES[request.param], folder), folder


def test_it_is_opened_without_auto_tokenizer_and_is_the_same(trained: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose import takes a third of the start of every command."""
    from transformers import AutoTokenizer

    _, _, folder = trained
    theirs = AutoTokenizer.from_pretrained(folder)
    monkeypatch.setattr("transformers.AutoTokenizer", None)
    ours = tokenizer.load(folder)
    assert type(ours) is type(theirs) and ours.chat_template == theirs.chat_template and ours.init_kwargs == theirs.init_kwargs
    assert [ours(text) for text in TEXTS[:20]] == [theirs(text) for text in TEXTS[:20]]


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    alphabets = [
        "abc Seite ",
        " \n\t\r",
        "éüñßœ",
        "漢字かな한글",
        "अनुवाद",
        "🙂👩‍👩‍👧",
        "\u00a0\u202f▁\u200b\ufeff",
        "<0x41>",
        "".join(map(chr, range(1, 32))),
    ]
    texts = ["".join(rng.choice(rng.choice(alphabets)) for _ in range(rng.randint(0, 40))) for _ in range(count // 2)]
    anything = (c for c in iter(lambda: rng.randrange(1, 0x110000), None) if not 0xD800 <= c < 0xE000)
    return texts + ["".join(chr(next(anything)) for _ in range(rng.randint(1, 20))) for _ in range(count // 2)]


def test_any_text_survives(trained: tuple) -> None:
    _, words, _ = trained
    known = ["", " ", "  two  spaces  ", "\n\nlines\r\n", " lead", "trail ", "▁", "a▁b", "<0x0A>", "<unk>", "1234567890", *TEXTS[:50]]
    for text in known + random_texts(1000):
        ids = words(text, add_special_tokens=False)["input_ids"]
        assert words.decode(ids) == text


def test_size_specials_and_determinism(trained: tuple, tmp_path: Path) -> None:
    family, words, folder = trained
    assert len(words) == SIZES[family] == max(words.get_vocab().values()) + 1
    assert words.convert_ids_to_tokens(range(len(chat.FORMATS[family].specials))) == chat.FORMATS[family].specials
    assert words.eos_token == {"gemma2": "<eos>", "qwen2": "<|endoftext|>"}[family]
    assert (words("x")["input_ids"][0] == words.bos_token_id) == (family == "gemma2")
    tokenizer.train(TEXTS, family, SIZES[family], tmp_path / "again")
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_pieces_are_learnt_and_digits_stand_alone(trained: tuple) -> None:
    _, words, _ = trained
    assert words.tokenize("Seite 2024 speichern") == ["Seite", " ", "2", "0", "2", "4", " speichern"]


def test_same_segmentation_as_sentencepiece_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sentencepiece

    kept = {}
    original = sentencepiece.SentencePieceProcessor

    def keep(model_proto: bytes) -> object:
        kept["model"] = original(model_proto=model_proto)
        return kept["model"]

    monkeypatch.setattr(sentencepiece, "SentencePieceProcessor", keep)
    words = tokenizer.train(TEXTS, "gemma2", 350, tmp_path / "t")
    for text in [*TEXTS[::37], "öffnen speicher Seiten", "日本 мира"]:
        assert words.tokenize(text) == [piece.replace("▁", " ") for piece in kept["model"].encode(text, out_type=str)]


WRITTEN = {
    "gemma2": "<bos><start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\nHallo<end_of_turn>\n"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\nTschüss<end_of_turn>",
    "qwen2": "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nHallo<|im_end|>\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nTschüss<|im_end|>",
}
TALK = [("user", "Hi there"), ("assistant", "Hallo"), ("user", "Bye"), ("assistant", "Tschüss")]
MESSAGES = [{"role": role, "content": text} for role, text in TALK]


def test_chat_is_written_as_the_family_does_and_only_answers_are_learnt(trained: tuple) -> None:
    family, words, _ = trained
    ids, said = chat.encode(words, MESSAGES)
    assert words.decode(ids) == WRITTEN[family]
    end = chat.FORMATS[family].turns[1]
    learnt = words.decode([i for i, s in zip(ids, said, strict=True) if s])
    assert learnt == f"Hallo{end}Tschüss{end}"


def test_a_prompt_has_the_tokens_it_had_in_training(trained: tuple) -> None:
    _, words, _ = trained
    question = templates.translation_prompt("en", "pt_PT", "Save page 12")
    ids, said = chat.encode(words, [{"role": "user", "content": question}, {"role": "assistant", "content": " 12\nx"}])
    assert chat.prompt_ids(words, question) == ids[: said.index(1)]
    assert ids[-1] in chat.stop_ids(words) and words.eos_token_id in chat.stop_ids(words)


def test_a_system_turn_works_where_the_family_has_one(trained: tuple) -> None:
    family, words, _ = trained
    system = [{"role": "system", "content": "Be brief."}, *MESSAGES[:2]]
    if family == "gemma2":
        with pytest.raises(Exception, match="no system turn"):
            chat.encode(words, system)
    else:
        assert words.decode(chat.encode(words, system)[0]).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")


def test_released_prompt_is_exact() -> None:
    assert templates.translation_prompt("en", "pt_PT", "Hello world!") == (
        "Translate the following English source text to Portuguese (Portugal):\nEnglish: Hello world!\nPortuguese (Portugal): "
    )
    assert templates.PARALLEL[templates.RELEASED].write("de_DE", "en", "Hallo", "Hello").endswith("German: Hallo\nEnglish: Hello")
    assert templates.PARALLEL["own_names/1"].write("de_DE", "ja_JP", "Hallo", "やあ") == "Deutsch: Hallo\n日本語: やあ"
    assert templates.PARALLEL["target_titled/1"].write("en", "de_DE", "Hello", "Hallo") == "Übersetzung (Englisch → Deutsch)\nHello\nHallo"


def test_each_template_tells_whose_words_it_has_and_an_unknown_one_is_refused() -> None:
    told = dict(templates.document(name, "de_DE", "ja_JP", ["Hallo"], ["やあ"])[1] for name in templates.PARALLEL)
    assert told == {
        "released/1": "en", "english_names/1": "en", "own_names/1": "de_DE, ja_JP", "target_titled/1": "ja_JP", "source_titled/1": "de_DE"
    }  # fmt: skip
    with pytest.raises(KeyError, match="released/2"):
        templates.document("released/2", "de_DE", "ja_JP", ["Hallo"], ["やあ"])


def test_real_tokenizer_is_copied_and_given_a_chat_template_it_lacks(trained: tuple, tmp_path: Path) -> None:
    family, words, folder = trained
    bare = tmp_path / "base"
    words.save_pretrained(bare)
    (bare / "chat_template.jinja").unlink()
    (bare / "model.safetensors").write_bytes(b"weights are not copied")
    for name in ("config.json", "generation_config.json"):
        (bare / name).write_text('{"model_type": "gemma2"}')
    copied = tokenizer.copy(bare, family, tmp_path / "copy")
    assert copied.chat_template == chat.FORMATS[family].template and not (tmp_path / "copy" / "model.safetensors").exists()
    for name, source in (("tokenizer.json", folder), ("config.json", bare), ("generation_config.json", bare)):
        assert (tmp_path / "copy" / name).read_bytes() == (source / name).read_bytes()


def test_impossible_sizes_and_missing_folders_are_explained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.vocab_size=4000 is too large .* or less"):
        tokenizer.train(["one two"], "gemma2", 4000, tmp_path / "large")
    with pytest.raises(InputError, match=r"data\.vocab_size=270 is too small .* more than"):
        tokenizer.train(TEXTS, "gemma2", 270, tmp_path / "small")
    with pytest.raises(InputError, match=r"holds no tokenizer\.json"):
        tokenizer.load(tmp_path)
