"""The page: self-contained, whole, and honest about numbers of either sign."""

import html.parser
import re

import made_up
import pytest

from arra.pages.plots import PLAIN, VARIABLES, Series, column, curve, smooth, thousands
from arra.study.prose import alignment_sentence, depth_paragraph, result_paragraph
from arra.study.report import write_report
from arra.study.results import in_order, metric, show, show_difference, verdict

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(html.parser.HTMLParser):
    """Collects tags and checks that every element is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.sources = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.sources += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag == "img":
            assert attributes["alt"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, made_up.results(), made_up.samples(14), made_up.films(2))
    return path.read_text(encoding="utf-8")


def test_page_is_whole_and_needs_nothing_else(page):
    parsed = Page(page)
    assert parsed.open == []
    assert "script" not in parsed.tags
    assert "link" not in parsed.tags
    assert all(source.startswith(("data:image/", "#")) for source in parsed.sources)
    assert "url(http" not in page
    assert "@import" not in page
    assert len(parsed.ids) == len(set(parsed.ids))
    pictures = [s for s in parsed.sources if s.startswith("data:")]
    assert len(pictures) == 14 * 2 + 2 * 2 * 5


def test_every_prompt_and_measure_is_on_the_page(page):
    for sample in made_up.samples(14):
        assert sample.prompt in page
    for name in (*made_up.FIELDS, "fragments", "fd@made-up-judge"):
        assert metric(name).label in page
    assert "layer 1 of 32" in page
    assert "arra train scenes" in page


def test_colours_follow_the_scheme(page):
    assert not any(colour in page for colour in VARIABLES)
    for variable in VARIABLES.values():
        assert page.count(f"{variable}:") == 2  # light and dark


def test_a_caption_cannot_inject_markup(tmp_path):
    samples = made_up.samples(1)
    object.__setattr__(samples[0], "prompt", '<script>alert("x")</script>\udc80')
    path = write_report(tmp_path / "r.html", made_up.results(), samples)
    assert "<script>" not in path.read_text(encoding="utf-8")


def test_text_says_what_the_numbers_say():
    better = result_paragraph(made_up.results(0.09))
    assert "29.0 % of its pictures and the plain one in 20.0 %" in better
    assert "+9.0 points (95 % interval +5.0 to +13.0)" in better
    assert "better on 8 and not clearly different on 1 (relation)" in better
    worse = result_paragraph(made_up.results(-0.09))
    assert "−9.0 points" in worse
    assert "worse on 8" in worse
    assert "better" not in worse
    same = result_paragraph(made_up.results(0.0))
    assert "which may be chance" in same
    assert "not clearly different on all" in same
    assert "one pair of training runs" in same


def test_alignment_no_better_than_a_constant_is_said():
    results = made_up.results()
    assert "below the 0.300" in alignment_sentence(results)
    results["pairs"][0]["arms"]["aligned"]["log"][-1]["loss_gva"] = 0.31
    assert "no more than the mean feature" in alignment_sentence(results)
    for arm in results["pairs"][0]["arms"].values():
        arm["log"] = [{k: v for k, v in row.items() if k != "loss_gva"} for row in arm["log"]]
    assert alignment_sentence(results) is None


def test_depth_is_told():
    text = depth_paragraph(made_up.results()["depth"])
    assert "With layer 1 the same recipe gives validation loss 1.21 (plain: 1.21)" in text
    assert "with layer 3 1.13" in text


def test_several_pairs_get_their_own_section(tmp_path):
    results = made_up.results()
    results["pairs"] = [results["pairs"][0], made_up.results(0.05)["pairs"][0]]
    found = {"mean": 0.07, "low": -0.1, "high": 0.24, "p": 0.5, "differences": [0.09, 0.05]}
    results["over_seeds"] = {"test": {"all_right": found}}
    text = write_report(tmp_path / "r.html", results, []).read_text(encoding="utf-8")
    assert "From run to run" in text
    assert "first of 2 pairs" in text
    assert "+9.0, +5.0" in text


def test_numbers_are_printed_for_people():
    share, value = metric("colour"), metric("fd@x")
    assert show(share, 0.4123) == "41.2 %"
    assert show(value, 1234.5) == "1,234"
    assert show(value, 0.03171) == "0.0317"
    assert show(value, None) == "–"
    assert show_difference(share, -0.031) == "−3.1"
    assert show_difference(value, 0.5, 12.3) == "+0.5"
    assert show_difference(value, 0.0) == "±0"
    with pytest.raises(ValueError, match="unknown measure"):
        metric("beauty")


def test_verdict_depends_on_the_direction():
    up, down = {"low": 0.1, "high": 0.2}, {"low": -0.2, "high": -0.1}
    assert verdict(metric("colour"), up) == "better"
    assert verdict(metric("fragments"), up) == "worse"
    assert verdict(metric("colour"), {**up, "p": 0.06}) == "unclear"
    assert verdict(metric("colour"), {**up, "p": 0.01}) == "better"
    assert verdict(metric("fd@x"), down) == "better"
    assert verdict(metric("fd@x"), {"low": -1, "high": 1}) == "unclear"
    assert verdict(metric("fd@x"), {"low": None, "high": None}) == "unclear"


def test_measures_have_an_order():
    names = ["val_loss_ar", "fd@x", "shape", "fragments", "all_right"]
    assert in_order(names) == ["all_right", "shape", "fragments", "val_loss_ar", "fd@x"]


def test_figures_are_deterministic_and_bounded():
    series = [Series("plain", [1, 2, 3], [9.0, 2.0, 1.0], PLAIN, low=[8, 1, 0], high=[10, 3, 2])]
    first = curve(series, y_label="loss <&>")
    assert first == curve(series, y_label="loss <&>")
    assert re.match(r'<svg role="img" aria-label="loss &lt;&amp;&gt; against', first)
    assert smooth([1.0, 5.0, 3.0], 3) == [3.0, 3.0, 4.0]
    assert column([{"images_seen": 1, "a": 2.0}, {"images_seen": 2}], "a") == ([1], [2.0])
    assert [thousands(v) for v in (500, 12_000, 1_500_000)] == ["500", "12k", "1.5M"]
