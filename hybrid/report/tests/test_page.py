import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from hybrid.features import UNUSED, Categorical
from hybrid.report.page import SECTIONS, page
from hybrid.report.tests.examples import (
    EMPTY,
    EVIL,
    asked,
    attacked,
    evaluated,
    facts,
    funnelled,
    group,
    numbers,
    record,
    words,
)
from hybrid.version import Learned

VOID = {"meta", "br", "hr", "img", "input", "link"}
NO_NUMBERS = {"h1", "h2", "h3", "h4", "code", "time", "title", "desc", "style", "svg", "summary", "caption", "bdi"}


class Read(HTMLParser):
    """Each text with the elements around it, outermost first; and every attribute of every element."""

    def __init__(self, content):
        super().__init__()
        self.texts, self.attributes, self.tags, self._open = [], [], [], []
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in VOID:
            self._open.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        self.texts.append((data, list(self._open)))


def test_every_number_of_a_table_or_sentence_says_what_it_is():
    """Noised, public or oracle, said in words within it; only names, times and headings have digits without."""
    read = Read(page(facts()))
    unmarked = []
    for text, around in read.texts:
        if not around or not re.search(r"\d", text.replace("95 %", "")) or NO_NUMBERS & {tag for tag, _ in around}:
            continue
        if around[-1][0] == "th" and around[-2][0] == "tr":
            continue  # heads of columns: "version 2"
        if any(attributes.get("class") == "caption" for _, attributes in around):
            continue
        if not any("data-mark" in attributes for _, attributes in around):
            unmarked.append(text)
    assert unmarked == []
    aloud = [text for text, around in read.texts if around and around[-1][1].get("class") == "aloud"]
    assert {said.strip(" ()") for said in aloud} == {"noised", "public", "oracle"}


def test_pictures_say_what_they_show_and_of_which_kind_their_numbers_are():
    """Each has a title, a description and a badge in its figure, and its numbers are in a table behind it."""
    content = page(facts())
    figures = re.findall(r"<figure>.*?</figure>", content, re.DOTALL)
    assert len(figures) >= 9
    for figure in figures:
        assert figure.count("<title>") >= 1 <= figure.count("<desc>")
        assert "data-badge" in figure
    assert sum("<table" in figure for figure in figures) >= len(figures) - 1  # what noise hides is a table below


@pytest.mark.parametrize(
    "evil",
    [
        facts(words(EVIL, "calm")),
        facts(asked(EVIL, "categories", [group([1.0], EVIL)], by=EVIL, values=[EVIL], population=EVIL)),
        facts(unpaid=[EVIL]),
        facts(scope=EVIL, runs=[]),
        facts(trainings={1: record(EVIL, 1.0)}, aliases={EVIL: 1}),
    ],
    ids=["value", "feature and group", "unpaid", "scope", "run and alias"],
)
def test_text_of_others_is_text(evil):
    """`<script>` in a value, a name or a reason is shown as it is written, and no such element comes of it."""
    read = Read(page(evil))
    assert "script" not in read.tags
    assert evil.scope == EVIL or any(EVIL in text for text, _ in read.texts)
    assert not any(name.startswith("on") for _, name, _ in read.attributes)


def test_nothing_is_fetched_and_no_script_may_run():
    """No address of elsewhere in any attribute, only anchors; the policy allows nothing but the page's own style."""
    content = page(facts())
    read = Read(content)
    assert [value for _, _, value in read.attributes if "//" in (value or "")] == []
    assert all(value.startswith("#") for _, name, value in read.attributes if name in ("href", "src"))
    style = re.search(r"<style>(.*)</style>", content, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = next(value for _, name, value in read.attributes if name == "content" and "default-src" in value)
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'")
    assert "url(" not in style
    assert "@import" not in style
    assert not any(name == "style" for _, name, _ in read.attributes)  # the policy would not let it


def test_anchors_lead_to_sections():
    """One link and one section each."""
    read = Read(page(facts()))
    ids = [value for _, name, value in read.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = [value[1:] for _, name, value in read.attributes if name == "href"]
    assert links == [anchor for anchor, _, _ in SECTIONS]
    assert set(links) <= set(ids)


def test_a_model_without_anything_says_which_commands_fill_its_page():
    """One for each section."""
    codes = [text for text, around in Read(page(EMPTY)).texts if around and around[-1][0] == "code"]
    for command in (
        "hybrid train shop --epsilon",
        "hybrid analyze shop temperature --epsilon",
        "hybrid analyze shop label --epsilon",
        "hybrid evaluate shop:1 --epsilon",
        "hybrid evaluate shop:2 --against 1",
        "hybrid funnel shop",
        "hybrid drift shop",
        "hybrid audit inversion shop",
    ):
        assert any(command in code for code in codes), command


def test_the_latest_answer_is_shown():
    """Of two about one feature, with 587 and 588 people."""
    older = numbers()
    newer = older.model_copy(update={"shown": older.shown | {"people": 588}})
    content = page(facts(older, newer))
    assert ">588<" in content
    assert ">587<" not in content


def test_an_answer_in_which_nothing_stands_out_says_so():
    """Of texts that noise hides there is no picture, and no empty frame in its place."""
    content = page(facts(asked("home", "categories", [group([])], values=[])))
    assert "No value stands out from the noise." in content


def test_what_could_take_noise_away_is_not_shown():
    """A seed, in any answer."""
    assert "77123" not in page(facts())


def test_differences_and_attacks_are_said_in_words():
    """The interval of AUC's difference, 0.003 to 0.019, is above 0; verdicts are as the audit gave them."""
    content = page(facts(evaluated(), attacked()))
    assert "Version 2 ranks better than version 1" in content
    assert "From a clear embedding 2 of 2 features" in content


def test_a_funnel_says_how_many_devices_came_how_far_and_where_the_others_stopped():
    """3,600 with their interval installed, 210 found it too large; the phase below the threshold has no number."""
    content = page(facts(funnelled()))
    for said in ("2026-W47", "3,600", "3,545 to 3,655", "downloaded: too large", "210"):
        assert said in content, said
    row = re.search(r"<bdi>trained</bdi></th>(.*?)</tr>", content)[1]
    assert not re.search(r"\d", row)


def test_the_funnel_is_of_the_latest_week_whenever_it_was_told():
    """Week 46 told after week 47 does not hide it; of a week in which no version is seen that is said."""
    late = funnelled()
    early = late.model_copy(update={"shown": late.shown | {"week": "2026-W46", "versions": []}})
    assert "3,600" in page(facts(late, early))
    assert "No version has as many devices" in page(facts(early))


def test_versions_say_when_they_were_made_and_whom_their_epsilon_protects():
    """Of version 2, two days before; a reference has no epsilon to say it of."""
    overview = page(facts()).partition("Training records")[0]
    assert "2026-11-27" in overview
    assert overview.count("device features, per user") == 2


def test_what_a_version_learned_and_what_balance_did_is_shown():
    """The constant 7319, and the shift of -2.303 by sampling, which a prior of 0.0512 led to."""
    content = page(facts())
    for said in ("mean 7319", "-2.303", "0.0512"):
        assert said in content, said


def test_what_a_reference_was_balanced_by_is_an_oracles():
    """Without a mechanism neither the prior of 0.0512 nor the estimated shift is noised, and nobody may know them."""
    learned = {"learned": None, "epsilon": None, "kind": "noiseless"}
    reference = record("monday", 1.2).model_copy(update=learned)
    balance = reference.balance.model_copy(update={"prior_exact": True, "keep": (0.123, 1.0)})
    read = Read(page(facts(trainings={1: reference.model_copy(update={"balance": balance})})))
    marks = {
        text: next(attributes["data-mark"] for _, attributes in reversed(around) if "data-mark" in attributes)
        for text, around in read.texts
        if text in ("0.0512", "0.123", "-2.303", "+0.021")
    }
    assert marks == dict.fromkeys(("0.0512", "0.123", "-2.303", "+0.021"), "oracle")


def test_places_of_a_vocabulary_that_no_text_was_found_for_are_not_shown():
    """Of three places one was filled; what stands in the others is no text of anybody's."""
    zones = Learned(transforms={"zone": Categorical(discover=3).learned(["north"])}, users=9, run="monday")
    content = page(facts(trainings={1: record("monday", 1.2).model_copy(update={"learned": zones})}))
    assert "north" in content
    assert UNUSED not in content
