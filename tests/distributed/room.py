"""A small room to train in: data of both phases, random base weights, and the Hydra words that name them. Prepared in seconds."""

import json
import random
from pathlib import Path

# fmt: off
WORDS = [
    "the", "a", "red", "green", "old", "house", "river", "bird", "tree", "sings", "flows",
    "stands", "beside", "under", "quietly", "today", "never", "often", "jumps", "very", "quick", "lazy",
    "fox", "dozen", "boxing", "wizards", "pack", "my", "with", "jugs",
]
# fmt: on
SHAPE = (
    *("model.num_layers=4", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.kv_channels=16"),
    *("model.max_position_embeddings=128", "data.vocab_size=400", "phase.seq_length=64", "phase.global_batch_size=8"),
    *("phase.micro_batch_size=2", "phase.train_steps=20", "phase.optimizer.lr=5e-3", "phase.optimizer.warmup=0.1"),
    "cluster.threads_per_rank=1",
)


def words(folder: Path, family: str, *more: str) -> list[str]:
    """Hydra words of a small model of `family` on the data in `folder`; `more` come last."""
    named = [f"model=tiny_{family}", f"data.folder={folder}/{family}", f"data.cache={folder}/cache", f"run_dir={folder}/run"]
    window = ["model.sliding_window=16"] if family == "gemma2" else []
    return [*named, *SHAPE, *window, f"phase.start_from={folder}/{family}_base", *more]


def wpo_words(folder: Path, family: str, *more: str) -> list[str]:
    """The same for preference optimisation on the room's pairs."""
    options = ["phase=wpo", "phase.epochs=null", f"phase.file={folder}/{family}_pairs.jsonl", "phase.objective.beta=0.1"]
    return words(folder, family, *options, *more)


def grpo_words(folder: Path, family: str, *more: str) -> list[str]:
    """The same for GRPO on the room's prompts: 4 prompts x 4 answers a step."""
    options = ["phase=grpo", "phase.global_batch_size=4", "phase.micro_batch_size=4", "phase.seq_length=64", "phase.objective.kl=0.05"]
    rollout = ["rollouts_per_prompt=4", "temperature=1.0", "max_new_tokens=24", "processes=1"]
    return words(folder, family, *options, *(f"phase.rollout.{word}" for word in rollout), *more)


def prepare(folder: Path, family: str, seed: int = 7) -> None:
    """Write data in `folder`/<family> and random weights in `folder`/<family>_base."""
    from megatron_tower.command import load
    from megatron_tower.data import corpora, manifest, tokenizer
    from megatron_tower.models.hf import random_hf

    cfg = load(words(folder, family))
    data = Path(cfg.data.folder)
    (data / "cpt").mkdir(parents=True)
    (data / "sft").mkdir()
    rng = random.Random(seed)
    documents = [_text(rng) for _ in range(400)]
    names = tokenizer.train(
        [*documents, *("abcdefghijklmnopqrstuvwxyz" * 3, "0123456789")], family, cfg.data.vocab_size, data / "tokenizer"
    )
    blend = []
    for name, share, part in (("monolingual", 0.7, documents[:300]), ("parallel", 0.3, documents[300:])):
        blend.append({"prefix": name, "share": share, "tokens": corpora.write(data / "cpt" / name, part, names)})
    (data / "cpt" / "blend.json").write_text(json.dumps(blend))
    chats = ([("user", _text(rng, 4)), ("assistant", _text(rng, 8))] for _ in range(150))
    lines = (json.dumps({"messages": [{"role": r, "content": c} for r, c in chat]}) for chat in chats)
    (data / "sft" / "train.jsonl").write_text("\n".join(lines) + "\n")
    (data / "rl").mkdir()
    (data / "rl" / "train.jsonl").write_text("".join(json.dumps(_item(rng)) + "\n" for _ in range(40)))
    pairs = ({"prompt": _text(rng, 4), "chosen": _text(rng, 8), "rejected": _text(rng, 12)} for _ in range(60))
    (folder / f"{family}_pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    manifest.write(data, {"vocab_size": len(names)})
    random_hf(cfg.model, folder / f"{family}_base", data / "tokenizer", seed)


def _item(rng: random.Random) -> dict:
    """A prompt whose reward even a model with random weights earns now and then: few words, a letter that is frequent."""
    few = {"instruction_ids": ["length_constraints:number_words"], "kwargs": [{"relation": "less than", "num_words": 9}]}
    letter = {"instruction_ids": ["keywords:letter_frequency"], "kwargs": [{"let_relation": "at least", "letter": "e", "let_frequency": 3}]}
    family, check = rng.choice((("few_words", few), ("letter", letter)))
    return {"prompt": _text(rng, 4), "reward": "instructions", "family": family, "locale": "en", "answer": None, "check": check}


def _text(rng: random.Random, most: int = 30) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, most)))
