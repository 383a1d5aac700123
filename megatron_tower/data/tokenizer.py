"""A small tokenizer trained on the training text, in the family's own manner: sentencepiece BPE, byte fallback, single digits.

Written as a transformers fast tokenizer with the family's special tokens and chat template. Any text survives a round trip:
nothing is normalised, a space is a space (sentencepiece's `▁` is mapped back), what no piece covers is spelled in bytes.
A real family brings its own tokenizer, which is copied. Leaves out: sentencepiece's `.model` file, which nothing here reads.
"""

import io
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tower.config import InputError
from megatron_tower.data import chat
from megatron_tower.data.chat import FORMATS, ChatFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SPACE = "▁"
TRAVELS = (  # with the weights, wherever they go
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt"),
    *("config.json", "generation_config.json"),
)


def train(texts: Iterable[str], family: str, vocab_size: int, folder: Path) -> "PreTrainedTokenizerFast":
    """Train on one-line texts and write the folder; the vocabulary has exactly `vocab_size` entries, specials first.

    Raises InputError when the text is too little, or its alphabet too large, for that size.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    form = FORMATS[family]
    try:
        bytes_and_pieces = _train_pieces(texts, vocab_size - len(form.specials))
    except RuntimeError as error:
        raise InputError(f"data.vocab_size={vocab_size} {_why_not(str(error), len(form.specials) - 1)}") from error
    vocab = {token: i for i, token in enumerate([*form.specials, *bytes_and_pieces])}
    tokenizer = Tokenizer(models.BPE(vocab, _merges(bytes_and_pieces), byte_fallback=True, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    if form.bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{form.bos} $A", special_tokens=[(form.bos, vocab[form.bos])])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{name: token for name, token in _named(form).items() if token},
        additional_special_tokens=list(form.turns),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = form.template
    fast.save_pretrained(folder)
    return load(folder)


def copy(source: Path, family: str, folder: Path) -> "PreTrainedTokenizerFast":
    """All of a real family's folder but the weights, given the family's chat template where the base model's tokenizer has none."""
    folder.mkdir(parents=True)
    carry(source, folder)
    tokenizer = load(folder)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = chat.template(tokenizer, family)
        tokenizer.save_pretrained(folder)
    return tokenizer


def carry(source: Path, folder: Path) -> None:
    """Copy what travels with weights, as far as it is there."""
    for name in TRAVELS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def load(folder: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of a folder; raises InputError when it holds none."""
    if not (Path(folder) / "tokenizer.json").is_file():
        raise InputError(f"{folder} holds no tokenizer.json: run python -m tools.prepare_data, or download the model's tokenizer files")
    config = Path(folder) / "tokenizer_config.json"
    if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class") == "PreTrainedTokenizerFast":
        from transformers import PreTrainedTokenizerFast as Opened  # what AutoTokenizer finds, a third of a start later
    else:
        from transformers import AutoTokenizer as Opened
    return Opened.from_pretrained(str(folder), local_files_only=True)


def _named(form: ChatFormat) -> dict[str, str | None]:
    return {"bos_token": form.bos, "eos_token": form.eos, "pad_token": form.pad, "unk_token": form.unk}


def _train_pieces(texts: Iterable[str], count: int) -> list[str]:
    """The 256 bytes, then pieces in the order of their merges, with plain spaces."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=count + 1,  # and sentencepiece's <unk>, which is dropped
        byte_fallback=True,
        split_digits=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        max_sentence_length=1 << 20,
        num_threads=1,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return [pieces.id_to_piece(i).replace(_SPACE, " ") for i in range(1, pieces.get_piece_size())]


def _why_not(said: str, more: int) -> str:
    """sentencepiece's complaint in terms of the whole vocabulary, which has `more` entries than its own."""
    if limit := re.search(r"value <= (\d+)", said):
        return f"is too large for the training text: use {int(limit.group(1)) + more} or less, or prepare more text"
    if needed := re.search(r"required_chars\. \d+ vs (\d+)", said):
        return f"is too small for the alphabets of the training text: use more than {int(needed.group(1)) + more}"
    return f"does not suit the training text ({said})"


def _merges(pieces: list[str]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, earlier pieces first: the same choice as sentencepiece's by score."""
    known = set(pieces[256:])
    return [(p[:i], p[i:]) for p in pieces[256:] for i in range(1, len(p)) if p[:i] in known and p[i:] in known]
