"""The report of several systems: what it compares, marks, escapes, caps and refuses."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.text import Text

from evaluation import examples, report
from evaluation.metrics.bootstrap import Resampling
from evaluation.systems import compare, read
from megatron_tower.config import InputError

SPANS = [{"start": 0, "end": 2, "severity": "major", "text": "ab"}]
ALL = ("wmt24pp", "xcomet", "all", "all")


def system(folder: Path, values: list[float], texts: list[str] | None = None, per_segment: bool = True) -> Path:
    folder.mkdir(parents=True)
    mean = sum(values) / len(values)
    score = {"task": "wmt24pp", "metric": "xcomet", "value": mean, "low": mean - 0.3, "high": mean + 0.3, "count": len(values)}
    rows = [score | {"by": "all", "group": "all"}, score | {"by": "pair", "group": "en->de_DE"}]
    rows.append({"task": "general", "metric": "accuracy", "by": "all", "group": "all", "value": 50, "low": 40, "high": 60, "count": 9})
    checkpoint = {"path": str(folder), "sha256": "0", "phase": None, "step": None}
    (folder / "scores.json").write_text(json.dumps({"key": "k", "checkpoint": checkpoint, "scores": rows}))
    with (folder / "generations.jsonl").open("w") as file:
        for i, value in enumerate(values):
            row = {"task": "wmt24pp", "id": f"s{i}", "source_locale": "en", "target_locale": "de_DE", "source": f"Source {i} of the text."}
            row |= {"reference": f"Satz {i} des Textes.", "output": texts[i] if texts else f"Satz {i}", "finish": "stop"}
            file.write(json.dumps(row | ({"scores": {"xcomet": value}, "spans": {"xcomet": SPANS}} if per_segment else {})) + "\n")
    return folder


def page_data(path: Path) -> dict:
    text = path.read_text()
    return json.loads(text.partition('id="data">')[2].partition("</script>")[0])


def test_paired_comparison_sees_what_overlapping_intervals_hide(tmp_path):
    noise = [(i * 37 % 100) / 100 for i in range(60)]
    names = [f"{system(tmp_path / 'a', noise)}=a", f"{system(tmp_path / 'b', [v + 0.05 + i % 2 / 100 for i, v in enumerate(noise)])}=b"]
    found = compare(read(names), ALL, Resampling())
    assert (found.best, found.tied, found.paired) == (1, (), True)
    bare = [f"{system(tmp_path / n, [v + up for v in noise], per_segment=False)}={n}" for n, up in (("c", 0), ("d", 0.05))]
    found = compare(read(bare), ALL, Resampling())
    assert (found.best, found.tied, found.paired) == (1, (0,), False)


def test_page_holds_hostile_text_as_text_and_every_file_is_written(tmp_path):
    hostile = "</script><img src=x onerror=alert(1)>"
    names = [f"{system(tmp_path / 'a', [0.1, 0.9], [hostile, ''])}=<b>A</b>", f"{system(tmp_path / 'b', [0.2, 0.8])}=B_2 & co"]
    path = report.write(read(names), tmp_path / "out", "B_2 & co", ("wmt24pp/xcomet", None))
    text = path.read_text()
    assert "<img src=x" not in text and "<b>A" not in text and text.count("</script>") == 3
    assert "http://" not in text and "https://" not in text
    data = page_data(path)
    assert [e["answers"][0]["text"] for e in data["examples"]] == [hostile, ""]  # worst first
    assert data["examples"][1]["answers"][0]["failures"] == ["empty"]
    assert {p.name for p in path.parent.iterdir()} == {"index.html", "tables.md", "tables.tex", "tables.csv", "pareto.png", "pareto.svg"}
    assert r"B\_2 \& co" in (path.parent / "tables.tex").read_text()
    rows = list(csv.DictReader((path.parent / "tables.csv").open()))
    assert len(rows) == 6 and {row["system"] for row in rows} == {"<b>A</b>", "B_2 & co"}


def test_another_signature_is_pointed_out(tmp_path):
    """Of two systems whose metric was computed in another precision; the third has none."""
    names = []
    for name, precision in (("a", "fp32"), ("b", "bf16"), ("c", None)):
        path = system(tmp_path / name, [0.1, 0.9]) / "scores.json"
        scores = json.loads(path.read_text())
        for row in scores["scores"][: 3 if precision else 0]:
            row["signature"] = precision if row["metric"] == "xcomet" else "same"
        path.write_text(json.dumps(scores))
        names.append(f"{path.parent}={name}")
    for chosen, told in ((names, True), (names[1:], False)):
        page = report.write(read(chosen), tmp_path / f"out{told}")
        for path in (page, page.parent / "tables.md"):
            assert ("(the signatures in tables.csv differ): wmt24pp/xcomet." in path.read_text()) == told


def test_examples_are_capped_and_the_page_says_so(tmp_path, monkeypatch):
    folder = system(tmp_path / "a", [i / 100 for i in range(100)])
    path = report.write(read([str(folder)]), tmp_path / "out")
    assert all(a["spans"] == [[0, 2, "major"]] for e in page_data(path)["examples"] for a in e["answers"])
    assert [e["answers"][0]["scores"]["xcomet"] for e in page_data(path)["examples"]] == [i / 100 for i in range(examples.PER_PAIR)]
    assert f"{examples.PER_PAIR} of 100 segments" in path.read_text()
    monkeypatch.setattr(examples, "BUDGET", 1000)
    assert len(page_data(report.write(read([str(folder)]), tmp_path / "out"))["examples"]) < 5


def test_a_run_stands_for_its_stages_in_order_joined_as_a_path(tmp_path, monkeypatch, capsys):
    run = tmp_path / "mine"
    for stage in ("extra", "wpo", "base", "sft", "unfinished"):
        system(run / stage / "evaluation", [0.5])
        scores = json.loads((run / stage / "evaluation" / "scores.json").read_text())
        checkpoint = {"path": str(run / stage), "phase": None if stage == "base" else stage}
        (run / stage / "evaluation" / "scores.json").write_text(json.dumps(scores | {"checkpoint": checkpoint}))
    (run / "unfinished" / "evaluation" / "scores.json").unlink()
    other = system(tmp_path / "b=c", [0.5])
    systems = read([f"{run}=Mine", str(other), f"{run / 'sft' / 'evaluation'}"])
    assert [s.label for s in systems] == ["Mine base", "Mine sft", "Mine wpo", "Mine extra", tmp_path.name, "sft"]
    assert [s.run for s in systems] == [str(run)] * 4 + [None, str(run)]
    with pytest.raises(InputError, match="two systems are called base: name them apart"):
        read([str(run), str(run)])
    monkeypatch.setattr(sys, "argv", ["report", str(run), "--output", str(tmp_path / "out")])
    report.main()
    assert capsys.readouterr().out == f"report: {tmp_path / 'out' / 'index.html'}\n"


def test_gaps_are_found_both_ways_a_pair_of_languages_at_a_time():
    bad = np.array([[-5, -1, -9, 0, np.nan], [-1, -4, -1, -1, -3], [-1, -4, -1, -np.inf, -3]])
    pairs = np.array(["de", "de", "de", "fr", "fr"])
    of = dict(zip([(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)], examples.gaps(bad, pairs), strict=True))
    assert of[0, 1] == [2, 0]  # by 8 and by 4
    assert of[1, 0] == [1, 3]  # the first of each pair of languages: by 3, by 1
    assert of[1, 2] == of[2, 1] == [] and of[2, 0] == [1]  # neither where a score is unknown nor where there is no gap


def test_a_page_shows_where_each_of_two_systems_is_the_better_one(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "PER_PAIR", 1)
    monkeypatch.setattr(examples, "PER_GAP", 1)
    one, other = [0.5, 0.9, 0.4, 0.1, 0.5], [0.6, 0.2, 0.8, 0.2, 0.05]
    systems = read([f"{system(tmp_path / 'a', one)}=a", f"{system(tmp_path / 'b', other)}=b"])
    shown, known = examples.examples(systems)
    assert {e["source"].split()[1] for e in shown} == {"3", "4", "1", "2"} and known == 5  # the worst of each, where a and where b wins
    assert [(a["metric"], a["bad"]) for e in shown if e["source"].startswith("Source 1") for a in e["answers"]] == [
        ("xcomet", -0.9),
        ("xcomet", -0.2),
    ]
    texts = ["Satz", "Satz 1 des Textes.", "Satz", "", "Satz"]
    bare = read([f"{system(tmp_path / 'c', one)}=c", f"{system(tmp_path / 'd', other, texts, per_segment=False)}=d"])
    shown, _ = examples.examples(bare)
    assert [e["source"].split()[1] for e in shown] == ["3"]  # xCOMET and chrF++ are not compared: only the worst of each
    assert [a["metric"] for a in shown[0]["answers"]] == ["xcomet", "chrF++"]


def test_the_front_is_what_no_system_beats():
    points = [(1, 9), (2, 8), (2, 7), (3, 8), (4, 1), (0, 10), (4, 0)]
    assert report.front(points, (1, 1)) == [(4, 1), (3, 8), (1, 9), (0, 10)]
    assert report.front(points, (-1, 1)) == [(0, 10)]
    assert report.front([(1, 2), (2, 1)], (-1, -1)) == [(1, 2), (2, 1)]


def test_names_in_the_figure_cover_neither_one_another_nor_a_point(tmp_path):
    systems = []
    for i in range(14):  # in a heap, and one far away
        systems += read([f"{system(tmp_path / str(i), [0.5 + i % 4 / 100 if i else 9.0])}=System ${i}$ of some name"])
    figure = report.pareto(systems, "wmt24pp/xcomet", "general/accuracy")
    (axes,) = figure.axes
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines to the points
    assert len(boxes) == 14 and axes.texts[3].get_text() == "System $3$ of some name"
    assert not [(i, j) for i in range(14) for j in range(i) if boxes[i].overlaps(boxes[j])]
    points = [axes.transData.transform((s.scores[ALL].value, 50)) for s in systems]
    assert not [1 for box in boxes for x, y in points if box.contains(x, y)]
    assert all(axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 for box in boxes)
    plt.close(figure)


def test_tables_hold_odd_names_as_text(tmp_path):
    odd = 'a&b %c $d #e _f {g} ~h ^i \\j <k> |l\n\nm "n`o'
    path = report.write(read([f"{system(tmp_path / 'a', [0.1])}={odd}", f"{system(tmp_path / 'b', [0.2])}=b"]), tmp_path / "out")
    head = (path.parent / "tables.tex").read_text().splitlines()[2]
    assert head == (
        r"task & metric & group & a\&b \%c \$d \#e \_f \{g\} \textasciitilde{}h \textasciicircum{}i \textbackslash{}j "
        r'\textless{}k\textgreater{} \textbar{}l m "n\textasciigrave{}o & b \\'
    )
    assert "<k> \\|l m" in (path.parent / "tables.md").read_text().splitlines()[0]
    assert next(csv.reader(list((path.parent / "tables.csv").open(newline=""))[1:]))[0] == odd


def test_bad_input_is_one_sentence(tmp_path):
    folder = system(tmp_path / "a", [0.5])
    with pytest.raises(InputError, match=r"holds neither scores\.json"):
        read([str(tmp_path / "none")])
    with pytest.raises(InputError, match="two systems are called a"):
        read([f"{folder}=a", f"{folder}=a"])
    with pytest.raises(InputError, match="--baseline c is none"):
        report.write(read([f"{folder}=a"]), tmp_path / "out", "c")
    with pytest.raises(InputError, match="--x no/metric was scored for no system"):
        report.write(read([f"{folder}=a"]), tmp_path / "out", None, ("no/metric", None))
    assert not (tmp_path / "out").exists()
    with (folder / "generations.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(InputError, match=r"generations.jsonl:2: not an object"):
        read([str(folder)])
