"""`python -m megatron_tower.translate`: prompts, lines, and what it says to bad input."""

import io
import sys
from pathlib import Path

import pytest

from megatron_tower import translate
from megatron_tower.command import load

SHAPE = ("num_layers=2", "window_layers=[0]", "hidden_size=32", "ffn_hidden_size=48", "kv_channels=8", "max_position_embeddings=256")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HF folder of random weights."""
    from megatron_tower.data import tokenizer
    from megatron_tower.models.hf import random_hf

    folder = tmp_path_factory.mktemp("translate")
    text = ["the quick brown fox jumps over the lazy dog " * 5, "Translate the following English source text to German: " * 3]
    tokenizer.train(text, "gemma2", 330, folder / "tokenizer")
    cfg = load(["model=tiny_gemma2", "data.vocab_size=330", *(f"model.{word}" for word in SHAPE)])
    random_hf(cfg.model, folder / "hf", folder / "tokenizer", seed=1)
    return folder / "hf"


def run(monkeypatch: pytest.MonkeyPatch, *words: str, stdin: str = "") -> None:
    monkeypatch.setattr(sys, "argv", ["translate", *words])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    translate.main()


def test_one_line_a_sentence_in_their_order(checkpoint: Path, monkeypatch, capsys):
    """The model's answer to the released prompt, each sentence's the same alone and among others; a blank line stays blank."""
    words = ("--checkpoint", str(checkpoint), "--to", "de", "--max-new-tokens", "6")
    run(monkeypatch, *words, "the fox")
    alone = capsys.readouterr().out
    run(monkeypatch, *words, stdin="the lazy dog jumps over it\n\nthe fox\n")
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) == 4 and lines[1] == lines[3] == ""
    assert lines[2] + "\n" == alone and alone.strip()


def test_the_prompt_names_both_languages(checkpoint: Path, monkeypatch):
    from megatron_tower.data import chat

    asked = []
    original = chat.prompt_ids
    monkeypatch.setattr(chat, "prompt_ids", lambda tokenizer, text: asked.append(text) or original(tokenizer, text))
    run(monkeypatch, "--checkpoint", str(checkpoint), "--from", "de", "--to", "pt_BR", "--max-new-tokens", "1", "Guten Tag")
    (prompt,) = asked
    first, source, target = prompt.split("\n")
    assert first.startswith("Translate the following German source text to Portuguese")
    assert source == "German: Guten Tag" and target.startswith("Portuguese") and target.endswith(": ")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--to", "xx", "hello"), "language xx is unknown"),
        (("--to", "de"), "nothing to translate"),
        (("--to", "de", "hello " * 300), "context of 256"),
        (("--to", "de", "--checkpoint", "nowhere", "hello"), "nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(checkpoint: Path, monkeypatch, capsys, words, told):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--checkpoint", str(checkpoint), *words)
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.err.startswith("error: ") and told in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""
