"""A view shows the text as it is, whatever is in it; it loads nothing, and its colours can be read and told apart."""

import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from tiny import shaped_config, tiny_model

from engram_hf.insight.pictures import find_browser
from engram_hf.insight.showing import BLUE, ORANGE, PAPER, show
from engram_hf.insight.tracing import Effect, Trace, trace


CODE = "def f(x):\n\tif x:\n\n        return '$x$'\n"
HOSTILE = "<script>alert('1')</script> & \"a\" [bold]b[/bold] {{c}} ${d}\x1b[31m\x00\u202eend"
SCRIPTS = "שלום עולם\nمرحبا بالعالم\n日本語と中文 한국어\n👩\u200d👩\u200d👧 🙂🏽 naïve"


@pytest.fixture(scope="module")
def model():
    return tiny_model(shaped_config((2, 3, 4), vocab_size=600, hidden_size=64))


@pytest.fixture
def view(model, tokenizer):
    return lambda text, *given, **named: show(trace(model, tokenizer, text), *given, **named)


class Page(HTMLParser):
    """The tags of a page, and its text by line without the details that a reader sees only on a token."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.lines, self.ways, self.hidden, self.tokens = [], [], [], 0, []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append((tag, given))
        if given.get("class") == "line":
            self.lines.append("")
            self.ways.append(given["dir"])
        if tag == "span":
            self.hidden += bool(self.hidden) or given.get("class") == "d"
            self.tokens += [int(given["data-token"])] if "data-token" in given else []

    def handle_endtag(self, tag):
        if tag == "span" and self.hidden:
            self.hidden -= 1

    def handle_data(self, data):
        if self.lines and not self.hidden and self.tags[-1][0] != "div" and "note" not in str(self.tags[-1]):
            self.lines[-1] += data


@pytest.mark.parametrize("text", [CODE, SCRIPTS])
def test_the_page_has_the_text_line_by_line_and_every_token(view, text):
    made = view(text)
    page = Page(made.html.partition('<div class="note')[0])
    assert [line.rstrip("\n") for line in page.lines] == text.removesuffix("\n").split("\n")
    assert sorted(set(page.tokens)) == list(range(len(made.trace.tokens)))


def test_lines_run_in_the_direction_of_their_first_letter(view):
    assert Page(view(SCRIPTS).html).ways == ["rtl", "rtl", "ltr", "ltr"]
    assert Page(view("12 (שלום) a\n... \na שלום").html).ways == ["rtl", "ltr", "ltr"]


def test_the_page_loads_nothing_and_runs_nothing(view):
    page = view(HOSTILE).html
    tags = Page(page).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "object", "base", "form"}
    assert not [name for _, given in tags for name in given if name.startswith("on") or name in ("src", "href")]
    assert not re.search(r"@import|url\(|https?:", page)
    assert "\x1b" not in page and "\x00" not in page and "\u202e" not in page and "\\u202e" in page
    assert "&lt;" in page and "&amp;" in page and "&quot;" in page


def test_a_token_that_is_a_tag_is_shown_and_is_no_tag():
    tag = "<script src=x>'\""
    found = replace(fixed_trace([0.5], [0.1]), tokens=[tag], ngrams={2: [tag]}, pieces=[tag])
    page = show(found, title=tag).html
    assert "script" not in {name for name, _ in Page(page).tags}
    assert [line.rstrip("\n") for line in Page(page.partition('<div class="note')[0]).lines] == [tag]


def test_the_page_is_utf8_whatever_is_in_the_text(tmp_path):
    found = replace(fixed_trace([0.5], [0.1]), tokens=["\ud800"], ngrams={2: ["\ud800"]})
    assert "\\ud800" in show(found).save(tmp_path / "deep" / "x.html").read_text(encoding="utf-8")


def test_details_say_ngrams_rows_gates_and_effects(view):
    made = view("the end of the line")
    found, position = made.trace, 3
    detail = made.detail(position)
    for layer_id in found.layer_ids:
        gates = " ".join(f"{gate:.2f}" for gate in found.gates[layer_id][position])
        assert f"layer {layer_id}: gate {gates}, adds {found.share[layer_id][position]:.0%}" in detail
        assert f"rows {' '.join(map(str, found.row_ids[layer_id][position]))}\n" in detail + "\n"
        assert f"{found.effects[layer_id].gain[position]:+.2f} nats" in detail
    assert all(f"{order}-gram “{found.ngrams[order][position]}”" in detail for order in (2, 3))
    assert "no next token" in made.detail(len(found.tokens) - 1)


def test_two_views_on_one_page_have_buttons_of_their_own(model, tokenizer):
    found = trace(model, tokenizer, "a b")
    names = [re.search(r'name="([^"]+)"', show(found)._repr_html_())[1] for _ in range(2)]
    assert names[0] != names[1]


def fixed_trace(gates: list[float], gains: list[float]) -> Trace:
    """A text of single letters with these gates and effects."""
    count, zeros = len(gates), np.zeros(len(gates), np.float32)
    tokens = [chr(97 + i % 26) for i in range(count)]
    effect = Effect(np.array(gains, np.float32) - 1, zeros - 1, np.abs(np.array(gains, np.float32)))
    return Trace(
        text="".join(tokens),
        tokens=tokens,
        pieces=tokens,
        token_ids=np.arange(count),
        ngrams={2: tokens},
        gates={1: np.array(gates)[:, None]},
        row_ids={1: np.zeros((count, 2), int)},
        rows_of_heads={1: np.ones(2, int)},
        norms={1: zeros},
        share={1: zeros},
        effects={1: effect},
    )


def test_a_wider_gate_is_a_deeper_shade_and_harm_has_a_colour_and_a_line_of_its_own():
    found = fixed_trace([0.0, 0.2, 0.9, 0.5], [0.5, -1.0, 0.1, float("nan")])
    gate, effect = show(found), show(found, "effect")
    shades = gate.measure.shades()
    assert shades[2] == 1 and shades[1] == 0 and 0.3 < shades[3] < 0.6
    assert shades[0] == 0 and np.isnan(gate.measure.values[0]), "a token without memory is not one whose gate is shut"
    assert gate.strongest() == [2, 3, 1] and effect.strongest() == [0, 2, 1]
    assert effect.measure.shades()[1] == -1 and effect.measure.shades()[3] == 0
    spans = re.findall(r'<span class="(t[^"]*)" style="([^"]*)" data-token="(\d)"', effect.html)
    assert [classes for classes, _, _ in spans] == ["t", "t l1", "t", "t"]


def luminance(colour: tuple[float, ...]) -> float:
    """Of WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (each / 255 for each in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_on_every_shade(dark):
    ink = luminance((238, 238, 238) if dark else (26, 26, 26))
    for colour in (BLUE[dark], ORANGE[dark]):
        for shade in np.linspace(0, 1, 11):
            ground = luminance([p + (c - p) * shade for c, p in zip(colour, PAPER[dark])])
            assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) > 4.5


@pytest.mark.parametrize("dark", [False, True])
def test_colour_blind_people_can_tell_help_from_harm(dark):
    # Red-green blindness, as Viénot and others (1999) simulate it, in linear RGB; the blue part stays as it is.
    protan = np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]])
    deutan = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])
    more, less = (((np.array(each[dark]) / 255) ** 2.2) for each in (BLUE, ORANGE))
    for seen in (protan, deutan):
        assert np.linalg.norm(seen @ more - seen @ less) > 0.25


@pytest.mark.parametrize("text", [CODE, SCRIPTS, HOSTILE])
def test_a_terminal_shows_the_text_and_obeys_nothing_in_it(view, text):
    made = view(text)
    console = Console(width=40, record=True, file=io.StringIO(), force_terminal=True, legacy_windows=False)
    console.print(made.text())
    told = console.export_text()
    assert all(cell_len(line) <= 40 for line in told.splitlines())
    assert not set("\x1b\x00\u202e") & set(told)
    plain = made.text().plain.replace("↵\n", "\n").replace("·", "")
    if text != HOSTILE:
        assert plain == text.replace("\t", "    ")
    else:
        assert "[bold]b[/bold] {{c}} ${d}\\x1b[31m\\x00\\u202eend" in plain


def test_a_terminal_lists_the_ngrams_with_the_widest_gates(view):
    made = view("the end of the line and the end of the file")
    console = Console(width=200, record=True, file=io.StringIO())
    made.print(console)
    told = console.export_text()
    for position in made.strongest():
        assert made.trace.ngrams[3][position].strip() in told and f"{made.measure.values[position]:.2f}" in told


def test_four_thousand_tokens_are_a_page_of_a_few_megabytes():
    count = 4000
    gates = torch.rand(count, generator=torch.Generator().manual_seed(0)).tolist()
    made = show(fixed_trace(gates, [gate - 0.5 for gate in gates]))
    assert len(Page(made.html).tokens) == count and len(made.html) < 800 * count


def test_a_picture_is_drawn_without_a_browser_and_says_what_it_lacks(view, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.warns(UserWarning, match="No Chromium or Chrome was found, so matplotlib draws"):
        path = view("a $x$ b\n\tשלום 日本").save(tmp_path / "x.png")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(find_browser() is None, reason="needs Chromium or Chrome")
def test_a_picture_is_one_of_the_page(view, tmp_path):
    matplotlib_image = pytest.importorskip("matplotlib.image")
    picture = matplotlib_image.imread(view("the end\n" * 30).save(tmp_path / "x.png"))
    # 31 lines of 26 pixels and a note below them, at one and a half times the pixels.
    assert picture.shape[1] == 900 * 1.5 and 31 * 26 * 1.5 < picture.shape[0] < 45 * 26 * 1.5
    # Blue ground, dark ink, and paper at the lower edge.
    blue = np.abs(picture[..., :3] * 255 - BLUE[False]).max(-1) < 3
    assert blue.mean() > 0.001 and picture[..., :3].min() < 0.2 and (picture[-3:, :, :3] > 0.99).all()


def test_what_cannot_be_shown_is_said_in_a_sentence(model, tokenizer, tmp_path):
    found = trace(model, tokenizer, "a b", effects=False)
    with pytest.raises(ValueError, match="has no memory layer 1; it has"):
        show(found, layer_id=1)
    with pytest.raises(ValueError, match="no effects. Trace the text again"):
        show(found, "effect")
    with pytest.raises(ValueError, match='what is "gate" or "effect"'):
        show(found, "gates")
    with pytest.raises(ValueError, match=r"saved as .html or .png, got 'x.pdf'"):
        show(found).save(tmp_path / "x.pdf")
