"""The page holds everything it shows, runs nothing, and no name of a user's file can become markup."""
import json
from html.parser import HTMLParser

import pytest
from PIL import Image

import report

HOSTILE = ['"><script>alert(1)</script>', "' onerror='x", "<b>", "&lt;", "ü 猫 \U0001f600", "\u202egnp.exe", "a\nb", "\udcff"]


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.said = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.said.append(data)


def result(word="word", **more):
    return {"title": word, "text": [word], "tables": [{"caption": word, "head": [word], "rows": [[word], [1.5]]}], "figures": [],
            "settings": {word: word}, "split": [[word, word, 1, 2]], **more}


def test_hostile_names_stay_text(tmp_path):
    (tmp_path / "figures").mkdir()
    Image.new("RGB", (4, 3)).save(tmp_path / "figures/a ' <b>.png")
    plain = Page(page_of(tmp_path, {"x": result(figures=[{"file": "a ' <b>.png", "caption": "word"}], summary="word", not_run=["word"])}))
    for name in HOSTILE:
        hostile = Page(page_of(tmp_path, {"x": result(name, figures=[{"file": "a ' <b>.png", "caption": name}], summary=name, not_run=[name])}))
        assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
        assert [set(attrs) for _, attrs in hostile.tags] == [set(attrs) for _, attrs in plain.tags]
        shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
        assert hostile.said.count(shown) >= 10 and all(tag != "script" for tag, _ in hostile.tags)


def page_of(folder, metrics):
    report.write_report(folder, metrics)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_is_self_contained_and_fit_for_phone_print_and_dark(tmp_path):
    (tmp_path / "figures").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "figures/a.png")
    text = page_of(tmp_path, {"x": result(figures=[{"file": "a.png", "caption": "one"}, {"file": "a.png", "caption": "two", "gallery": True}])})
    page = Page(text)
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert [image["alt"] for image in images] == ["one", "two"] and all(image["src"].startswith("data:image/png;base64,") for image in images)
    assert not any("http" in value for _, attrs in page.tags for value in attrs.values() if value and not value.startswith("data:"))
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert ("meta", {"name": "viewport", "content": "width=device-width,initial-scale=1"}) in page.tags
    assert "@media print" in text and "prefers-color-scheme: dark" in text and "@import" not in text and "url(" not in text


def test_what_was_not_run_is_said_and_speed_comes_along(tmp_path):
    text = page_of(tmp_path, {"inspection": result("Inspection", not_run=["no older masks"]), "generation": result("Generation")})
    assert text.index(">Generation</h2>") < text.index(">Inspection</h2>") < text.index(">Not run</h2>")
    said = text[text.index(">Not run</h2>"):]
    assert "<li>Segmentation: whether" in said and "<li>Speed: what" in said and "<li>no older masks" in said and "<li>Inspection" not in said
    table = {"caption": "Milliseconds", "head": ["network"], "rows": [["large"]]}
    (tmp_path / "speed.json").write_text(json.dumps({"size": {"machine": "a machine", "measured": [], "table": table}, "training": {"machine": "a machine", "measured": []}}))
    text = page_of(tmp_path, {"x": result()})
    assert ">Speed</h2><p>a machine</p>" in text and "Milliseconds" in text and "<li>Speed" not in text


def test_the_summary_comes_first_and_a_run_through_says_so(tmp_path):
    text = page_of(tmp_path, {"x": result(summary="All is well.", settings={"quick": "the numbers mean nothing"})})
    assert text.index("A run-through of --quick: the numbers mean nothing.") < text.index("All is well.") < text.index("<h2>")


def test_results_of_older_versions_are_shown(tmp_path):
    older = {key: value for key, value in result().items() if key != "split"}
    text = page_of(tmp_path, {"generation": older, "x": result("b")})
    assert "Data split" in text and ">–</td>" in text                           # a setting that the other did not have


def test_the_page_is_written_again_from_what_lies_there(tmp_path, monkeypatch, capsys):
    (tmp_path / "metrics.json").write_text(json.dumps({"x": result()}))
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path)])
    report.main()
    assert (tmp_path / "report.html").exists() and str(tmp_path / "report.html") in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path / "nowhere")])
    with pytest.raises(FileNotFoundError, match="run the experiments first"):
        report.main()


def test_a_plot_takes_values_at_x_points_and_labels():
    picture = report.plot([0, 1, 2], {"values": [1, 2, 3], "points": [(0, 1), (2, 3)], "a single value": [2, 2, 2]}, labels=["low", "", "high"])
    assert picture.size == (640, 360 + 3 * 22) and len(picture.getcolors(10**5)) > 3
    assert report.plot([5], {"one": [1.0]}).size == (640, 382)


def test_spread_is_the_sample_standard_deviation():
    assert report.mean_spread([0.5, 0.6, 0.7]) == "60.0 ± 10.0" and report.mean_spread([0.5]) == "50.0"
