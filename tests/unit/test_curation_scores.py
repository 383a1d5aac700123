"""Scores of rows by tiny real models of random weights: the same whatever the batching, and what can't give one is refused."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, XLMRobertaConfig, XLMRobertaForSequenceClassification

from megatron_tower.config import InputError
from megatron_tower.config_data import ScoreConfig
from megatron_tower.curation import scores
from megatron_tower.rollout.scorers import load_comet
from tests.unit.comet_folders import comet_folder, encoder_folder

WORDS = ["the", "harbour", "was", "built", "in", "seventeenth", "century", "when", "ships", "brought", "salt", "and", "timber"]
LENGTHS = (3, 1, 14, 7, 700, 2, 11, 5)
TEXTS = [" ".join(WORDS[(i + k) % len(WORDS)] for k in range(n)) for i, n in enumerate(LENGTHS)]
ROWS = [{"text": text} for text in TEXTS]
PAIRS = [{"source": source, "target": target} for source, target in zip(TEXTS, TEXTS[3:] + TEXTS[:3], strict=True)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_folder(tmp_path_factory.mktemp("encoder"), [" ".join(WORDS)])


def classifier_folder(encoder: Path, folder: Path, outputs: int) -> Path:
    torch.manual_seed(3)
    model = XLMRobertaForSequenceClassification(XLMRobertaConfig.from_pretrained(encoder, num_labels=outputs))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
    return folder


def by_hand(folder: Path, text: str) -> torch.Tensor:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), XLMRobertaForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(**tokenizer(text, truncation=True, max_length=512, return_tensors="pt")).logits[0]


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_classifier_scores_each_text_as_if_it_were_alone(
    outputs: int, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = ScoreConfig(str(classifier_folder(encoder, tmp_path / "model", outputs)), 0.0)
    scores.check("a", cfg)
    together = scores.score(ROWS, cfg)
    monkeypatch.setattr(scores, "TOKENS", 1)
    assert scores.score(ROWS, cfg) == pytest.approx(together, abs=1e-5)
    wanted = [by_hand(tmp_path / "model", text) for text in TEXTS]
    wanted = [(logits[0] if outputs == 1 else logits.softmax(-1)[1]).item() for logits in wanted]
    assert together == pytest.approx(wanted, abs=1e-5)
    assert len({round(value, 4) for value in together}) == len(TEXTS), "the scores hardly differ: the test shows nothing"


def test_comet_scores_pairs_whatever_the_batching(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = ScoreConfig(str(comet_folder("referenceless_regression_metric", encoder, tmp_path / "comet")), 0.7)
    scores.check("a", cfg)
    together = scores.score(PAIRS, cfg)
    monkeypatch.setattr(scores, "TOKENS", 1)
    assert scores.score(PAIRS, cfg) == pytest.approx(together, abs=1e-5)
    theirs = load_comet(tmp_path / "comet")
    samples = [{"src": row["source"], "mt": row["target"]} for row in PAIRS]
    with torch.inference_mode():
        wanted = [theirs.predict_step(theirs.prepare_for_inference([sample]))["scores"].item() for sample in samples]
    assert together == pytest.approx(wanted, abs=1e-5)
    assert len({round(value, 4) for value in together}) == len(PAIRS), "the scores hardly differ: the test shows nothing"


def test_batches_hold_every_row_once_and_no_more_than_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "TOKENS", 60)
    batches = list(scores._batches(ROWS, longest=30))
    assert sorted(place for batch in batches for place in batch) == list(range(len(ROWS)))
    assert batches[0] == [4, 2] and len(batches) == 2 + (len(ROWS) > 6)  # the 700 words count as the 30 tokens that are read
    for batch in batches:
        assert len(batch) * max(min(120, len(TEXTS[place])) for place in batch) <= 60 * scores.BYTES


def test_what_tells_one_model_from_another(encoder: Path, tmp_path: Path) -> None:
    one, two = (ScoreConfig(str(classifier_folder(encoder, tmp_path / str(n), n)), 0.0) for n in (1, 2))
    assert scores.fingerprint(one) == scores.fingerprint(one) != scores.fingerprint(two)


def test_what_gives_no_score_is_refused(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.model=nowhere has no config\.json"):
        scores.check("a", ScoreConfig("nowhere", 0.0))
    with pytest.raises(InputError, match="has no safetensors"):
        scores.check("a", ScoreConfig(str(encoder), 0.0))
    bound = comet_folder("regression_metric", encoder, tmp_path / "bound")
    with pytest.raises(InputError, match="needs references"):
        scores.check("a", ScoreConfig(str(bound), 0.0))
    (bound / "checkpoints" / "model.ckpt").unlink()
    with pytest.raises(InputError, match=r"has no checkpoints/model\.ckpt"):
        scores.check("a", ScoreConfig(str(bound), 0.0))
    with pytest.raises(InputError, match="has 3 outputs"):
        scores.score(ROWS, ScoreConfig(str(classifier_folder(encoder, tmp_path / "three", 3)), 0.0))
