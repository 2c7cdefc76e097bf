"""A trace as a picture: HTML for notebooks and browsers, PNG for cards, and text for a terminal.

Each view shows one measure of each token as a shade of one colour. A deeper blue is a wider gate, or a prediction that
the memory has helped; orange, underlined, is one that it has harmed. Blue and orange look different to colour-blind
people too. The HTML is one file that loads nothing, and it has no script: buttons and details are CSS.
"""

import html
import math
import os
import re
import secrets
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .pictures import picture_of_page, picture_of_shades
from .tracing import Trace


if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table
    from rich.text import Text

# Tokens that the list below a text names.
LISTED = 8
# Shares of tokens beyond both ends of a scale, so that a single one does not make all others look alike.
CLIPPED = 0.02
# Red, green and blue of "more" and "less", and of what lies below them; by whether the background is dark.
BLUE = {False: (86, 180, 233), True: (0, 108, 170)}
ORANGE = {False: (230, 159, 0), True: (168, 80, 0)}
PAPER = {False: (255, 255, 255), True: (27, 27, 27)}
# Characters that turn the direction of what follows them.
DIRECTIONS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}
# Of Unicode: right to left (Arabic letters join), and what belongs to the character before it.
RIGHT_TO_LEFT, JOINS = ("R", "AL"), ("Mn", "Me", "Mc", "Cf", "Sk")
STYLE = """
.engram-look{--fg:#1a1a1a;--bg:#fff;--faint:#5f5f5f;--line:#ddd;--more:86 180 233;--less:230 159 0;color:var(--fg);
background:var(--bg);font:15px/1.75 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
padding:.8em 1em;position:relative;border-radius:6px;text-align:start}
@media (prefers-color-scheme:dark){.engram-look:not(.light){DARK}}
.engram-look.dark,body.dark .engram-look,body[data-jp-theme-light=false] .engram-look,
body.vscode-dark .engram-look{DARK}
body[data-jp-theme-light=true] .engram-look:not(.dark),body.vscode-light .engram-look:not(.dark){LIGHT}
.engram-look input{position:absolute;opacity:0}
.engram-look label{display:inline-block;padding:0 .7em;margin:0 .3em .7em 0;border:1px solid var(--line);
border-radius:1em;font-size:13px;cursor:pointer;color:var(--faint)}
.engram-look input:checked+label{color:var(--fg);border-color:currentColor;font-weight:600}
.engram-look input:focus-visible+label{outline:2px solid rgb(var(--more))}
.engram-look .line{white-space:pre-wrap;overflow-wrap:anywhere;min-height:1.75em;tab-size:4}
.engram-look .t{border-radius:3px;padding-block:2px;cursor:default;box-shadow:inset 0 0 0 .5px rgb(128 128 128/.25);
-webkit-box-decoration-break:clone;box-decoration-break:clone}
.engram-look .t.cut::before{content:"\\00b7";color:var(--faint)}
.engram-look .t.end::after{content:"\\21b5";color:var(--faint)}
.engram-look .t:hover,.engram-look .t:focus{outline:2px solid var(--fg);outline-offset:0}
.engram-look .t .d{display:none}
.engram-look .t:hover .d,.engram-look .t:focus .d{display:block;position:absolute;left:1em;right:1em;margin-top:.2em;
z-index:9;padding:.6em .8em;background:var(--bg);color:var(--fg);border:1px solid var(--faint);border-radius:6px;
font-size:13px;line-height:1.5;white-space:pre-wrap;direction:ltr;unicode-bidi:isolate;text-align:left;
box-shadow:0 4px 16px rgb(0 0 0/.25);pointer-events:none;text-decoration:none}
.engram-look .note{display:none;margin-top:.8em;padding-top:.6em;border-top:1px solid var(--line);font-size:13px;
color:var(--faint)}
.engram-look .note b{color:var(--fg);font-weight:600}
.engram-look .bar{display:inline-block;width:9em;height:.8em;margin:0 .6em;border-radius:3px;vertical-align:-.05em;
box-shadow:inset 0 0 0 .5px rgb(128 128 128/.4)}
.engram-look .item{display:inline-block;margin:.25em 1.2em 0 0;white-space:pre;unicode-bidi:isolate}
.engram-look.picture label{display:none}
"""
LIGHT = "--fg:#1a1a1a;--bg:#fff;--faint:#5f5f5f;--line:#ddd;--more:86 180 233;--less:230 159 0"
DARK = "--fg:#eee;--bg:#1b1b1b;--faint:#a8a8a8;--line:#444;--more:0 108 170;--less:168 80 0"


@dataclass(frozen=True)
class Measure:
    """One number for each token, and how it is shown.

    name: on its button.
    sentence: what it is.
    values: (tokens,); NaN for a token that has none.
    low, high: the ends of the scale; below 0 and above it for an effect.
    layer_id: the memory layer.
    is_effect: whether numbers below 0 mean something else than those above.
    """

    name: str
    sentence: str
    values: np.ndarray
    low: float
    high: float
    layer_id: int
    is_effect: bool

    def shades(self) -> np.ndarray:
        """(tokens,) in [-1, 1]: how deep a token is coloured, and below 0 in the other colour."""
        width = self.high if self.is_effect else self.high - self.low
        start = 0.0 if self.is_effect else self.low
        if width <= 0:
            return np.zeros(len(self.values))
        return np.nan_to_num(np.clip((self.values - start) / width, -1.0 if self.is_effect else 0.0, 1.0))

    def written(self, value: float) -> str:
        return "" if np.isnan(value) else format(value, "+.2f" if self.is_effect else ".2f")


def show(
    trace: Trace, what: str = "gate", *, layer_id: int | None = None, dark: bool | None = None, title: str | None = None
) -> "View":
    """A view of a trace, for a notebook, a file or a terminal.

    In a notebook the view is the last value of a cell. `rich.print(view)` or `view.print()` writes it to a terminal,
    `view.save("x.html")` and `view.save("x.png")` to a file.

    Args:
        trace: as `engram_hf.insight.trace` returns it.
        what: "gate" (mean over the residual streams) or "effect" (nats by which a memory layer makes the true next
            token more likely). HTML has buttons for all measures; this one is shown first, and in pictures.
        layer_id: the memory layer; by default the first.
        dark: True or False for a background; by default that of the reader's browser or notebook.
        title: of the page.

    Raises:
        ValueError: the trace has no such layer, or no effects.

    Example:
        >>> from engram_hf.insight import trace
        >>> view = show(trace(model, tokenizer, "import os, sys"))
        >>> view.save("output/look.html").name
        'look.html'
    """
    measures = _measures(trace)
    layer_id = trace.layer_ids[0] if layer_id is None else layer_id
    if layer_id not in trace.layer_ids:
        raise ValueError(f"The trace has no memory layer {layer_id}; it has {trace.layer_ids}.")
    if what not in ("gate", "effect"):
        raise ValueError(f'what is "gate" or "effect", got {what!r}.')
    found = [i for i, m in enumerate(measures) if m.layer_id == layer_id and m.is_effect == (what == "effect")]
    if not found:
        raise ValueError("This trace has no effects. Trace the text again, with effects=True.")
    return View(trace, measures, found[0], dark, title)


def _measures(trace: Trace) -> list[Measure]:
    measures = []
    for layer_id in trace.layer_ids:
        gates = trace.gates[layer_id].astype(np.float64)
        has_memory = (gates > 0).any(-1)
        values = np.where(has_memory, gates.mean(-1), np.nan)
        known = values[has_memory] if has_memory.any() else np.zeros(1)
        low, high = np.quantile(known, [CLIPPED, 1 - CLIPPED]).tolist()
        streams = f", mean of {gates.shape[1]} streams" if gates.shape[1] > 1 else ""
        sentence = f"How far the gate of layer {layer_id} opens{streams}"
        measures.append(Measure(f"gate, layer {layer_id}", sentence, values, low, high, layer_id, False))
    for layer_id, effect in (trace.effects or {}).items():
        gain = effect.gain.astype(np.float64)
        known = np.abs(gain[~np.isnan(gain)])
        most = float(np.quantile(known, 1 - CLIPPED)) if len(known) else 0.0
        sentence = f"By how many nats layer {layer_id} makes the true next token more likely"
        measures.append(Measure(f"effect, layer {layer_id}", sentence, gain, -most, most, layer_id, True))
    return measures


class View:
    """What `show` returns: a trace as HTML, as a picture, and as text."""

    def __init__(self, trace: Trace, measures: list[Measure], first: int, dark: bool | None, title: str | None):
        """
        Args:
            first: index of the measure that is shown first.
        """
        self.trace, self.measures, self.first, self.dark = trace, measures, first, dark
        self.title = title or "What a memory does to a text"
        self._name = f"engram-{secrets.token_hex(4)}"

    @property
    def measure(self) -> Measure:
        """The measure that is shown first."""
        return self.measures[self.first]

    def __repr__(self) -> str:
        return f"<View of {len(self.trace.tokens)} tokens: {', '.join(m.name for m in self.measures)}>"

    # HTML

    def _repr_html_(self) -> str:
        return self._fragment()

    @property
    def html(self) -> str:
        """A whole page."""
        return self._page(self._fragment())

    def _page(self, content: str, extra: str = "") -> str:
        title = html.escape(clean(self.title))
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width, initial-scale=1"><title>{title}</title><style>body{{margin:0}}</style>'
            f"{extra}</head><body>\n{content}\n</body></html>\n"
        )

    def _fragment(self, classes: str = "", dark: bool | None = None) -> str:
        dark = self.dark if dark is None else dark
        theme = {None: "", True: " dark", False: " light"}[dark]
        buttons, notes, rules = [], [], []
        for i, measure in enumerate(self.measures):
            own, checked = f"{self._name}-{i}", " checked" if i == self.first else ""
            buttons.append(
                f'<input type="radio" name="{self._name}" id="{own}"{checked}><label for="{own}">{measure.name}</label>'
            )
            notes.append(f'<div class="note n{i}">{self._note(measure)}</div>')
            rules.append(
                f"#{own}:checked~.text .t{{background:rgb(var(--more)/var(--v{i}))}}"
                f"#{own}:checked~.text .l{i}{{background:rgb(var(--less)/var(--v{i}));"
                "text-decoration:underline dashed;text-underline-offset:3px}"
                f"#{own}:checked~.n{i}{{display:block}}"
            )
        style = STYLE.replace("{DARK}", f"{{{DARK}}}").replace("{LIGHT}", f"{{{LIGHT}}}") + "\n".join(rules)
        text = "\n".join(f'<div class="line" dir="{way}">{line}</div>' for line, way in self._lines())
        return (
            f'<div class="engram-look{theme}{classes}"><style>{style}</style>\n{"".join(buttons)}\n'
            f'<div class="text">\n{text}\n</div>\n{"".join(notes)}</div>'
        )

    def _lines(self) -> Iterator[tuple[str, str]]:
        """The spans of each line of the text, and its direction. A token with line breaks has a span in each line."""
        shades = [measure.shades() for measure in self.measures]
        spans: list[str] = []
        line = ""
        for position, text in enumerate(self.trace.tokens):
            own = [shade[position] for shade in shades]
            style = ";".join(f"--v{i}:{_short(abs(value))}" for i, value in enumerate(own))
            less = "".join(f" l{i}" for i, value in enumerate(own) if value < 0)
            detail = html.escape(self.detail(position))
            parts = clean(text).split("\n")
            for number, part in enumerate(parts):
                is_end = number + 1 < len(parts)
                if part or is_end or not text:
                    marks = " cut" * self._is_cut(position) + " end" * is_end
                    spans.append(
                        f'<span class="t{less}{marks}" style="{style}" data-token="{position}" tabindex="0">'
                        f'{html.escape(part)}<span class="d">{detail}</span></span>'
                    )
                line += part
                if is_end:
                    yield "".join(spans), _direction(line)
                    spans, line = [], ""
        if spans:
            yield "".join(spans), _direction(line)

    def _is_cut(self, position: int) -> bool:
        """Whether a token is part of a character and is marked. A mark would tear letters apart that join, and emoji
        that are made of several."""
        if self.trace.tokens[position]:
            return False
        rest = next((text for text in self.trace.tokens[position:] if text), "")
        return not (rest and (unicodedata.bidirectional(rest[0]) == "AL" or unicodedata.category(rest[0]) in JOINS))

    def _note(self, measure: Measure) -> str:
        blue, orange = "rgb(var(--more))", "rgb(var(--less))"
        ends = [measure.written(measure.low), measure.written(measure.high)]
        colours = f"{orange},transparent,{blue}" if measure.is_effect else f"transparent,{blue}"
        bar = f'<span class="bar" style="background:linear-gradient(90deg,{colours})"></span>'
        items = "".join(
            f'<span class="item"><b>{html.escape(quoted(self._ngram(position)))}</b> '
            f"{measure.written(measure.values[position])}</span>"
            for position in self.strongest(measure)
        )
        verb = "It helps most after" if measure.is_effect else "It opens widest after"
        return f"{measure.sentence}: {ends[0]}{bar}{ends[1]}<br>{verb}<br>{items}"

    # What both HTML and terminal say of a token

    def _ngram(self, position: int) -> str:
        return self.trace.ngrams[max(self.trace.ngrams)][position]

    def strongest(self, measure: Measure | None = None, count: int = LISTED) -> list[int]:
        """Positions of the tokens with the largest values, at most one for each n-gram and for each last token."""
        values = (self.measure if measure is None else measure).values
        found: dict[Any, int] = {}
        for position in np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable").tolist():
            if np.isnan(values[position]) or len(found) == count:
                break
            found.setdefault(int(self.trace.token_ids[position]), position)
        return list(found.values())

    def detail(self, position: int) -> str:
        """All that is known of a token, in lines."""
        trace = self.trace
        lines = [f"{quoted(trace.tokens[position])}  token {position}, id {trace.token_ids[position]}"]
        if not trace.tokens[position]:
            lines[0] = f"part of a character ({clean(trace.pieces[position])})  token {position}"
        lines.append("  ".join(f"{order}-gram {quoted(texts[position])}" for order, texts in trace.ngrams.items()))
        for layer_id in trace.layer_ids:
            gates = trace.gates[layer_id][position]
            if not (gates > 0).any():
                lines.append(f"layer {layer_id}: no memory at this token")
                continue
            share = f"adds {trace.share[layer_id][position]:.0%} of the residual stream"
            lines.append(f"layer {layer_id}: gate {' '.join(f'{gate:.2f}' for gate in gates)}, {share}")
            rows = " ".join(map(str, trace.row_ids[layer_id][position].tolist()))
            never = "" if trace.trained is None else self._never_trained(layer_id, position)
            patched = "" if trace.patched is None else self._patched(layer_id, position)
            lines.append(f"  rows {rows}{never}{patched}")
            if trace.effects is not None:
                lines.append(f"  {self._effect(layer_id, position)}")
        return clean("\n".join(lines))

    def _never_trained(self, layer_id: int, position: int) -> str:
        trained = (self.trace.trained or {})[layer_id][position]
        return f" ({int((~trained).sum())} of {len(trained)} never trained)"

    def _patched(self, layer_id: int, position: int) -> str:
        patched = (self.trace.patched or {})[layer_id][position]
        return f" ({int(patched.sum())} of {len(patched)} patched)"

    def _effect(self, layer_id: int, position: int) -> str:
        effect = (self.trace.effects or {})[layer_id]
        kl = f"KL {effect.kl[position]:.3f}"
        if np.isnan(effect.gain[position]):
            return f"no next token; {kl}"
        after = quoted(self.trace.tokens[position + 1]) if position + 1 < len(self.trace.tokens) else ""
        with_it, without = np.exp(effect.log_prob[position]), np.exp(effect.silenced_log_prob[position])
        nats = f"{effect.gain[position]:+.2f} nats"
        return f"next {after}: {with_it:.1%} with this layer, {without:.1%} without it ({nats}), {kl}"

    # Terminal

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        yield self.text()
        yield ""
        yield self._legend()
        yield self.table()

    def print(self, console: "Console | None" = None) -> None:
        """Write the view to a terminal."""
        from rich.console import Console

        (Console() if console is None else console).print(self)

    @property
    def _is_dark_terminal(self) -> bool:
        """Most terminals are dark. Some say so in `COLORFGBG`, whose last number is the background."""
        told = os.environ.get("COLORFGBG", "").rpartition(";")[2]
        return self.dark if self.dark is not None else not (told.isdigit() and int(told) in (7, 15))

    def text(self) -> "Text":
        """The text with a background for each token."""
        from rich.text import Text

        found = Text(overflow="fold", no_wrap=False, end="")
        for text, shade in zip(self.trace.tokens, self.measure.shades().tolist(), strict=True):
            style = self._style(shade)
            for number, part in enumerate(_on_grid(text).split("\n")):
                if number:
                    found.append("↵\n", "dim")
                found.append(part if text else "·", style)
        return found

    def _style(self, shade: float) -> str:
        dark = self._is_dark_terminal
        if abs(shade) < 0.05:
            return ""
        colour = (BLUE if shade > 0 else ORANGE)[dark]
        mixed = [round(paper + (own - paper) * abs(shade)) for own, paper in zip(colour, PAPER[dark])]
        background = "#" + "".join(f"{each:02x}" for each in mixed)
        return f"{'#eeeeee' if dark else '#1a1a1a'} on {background}{' underline' * (shade < 0)}"

    def _legend(self) -> "Text":
        from rich.text import Text

        measure = self.measure
        found = Text(f"{measure.sentence}: {measure.written(measure.low)} ")
        steps = np.linspace(-1 if measure.is_effect else 0, 1, 12).tolist()
        for step in steps:
            found.append(" ", self._style(step))
        return found.append(f" {measure.written(measure.high)}")

    def table(self, positions: list[int] | None = None) -> "Table":
        """What is known of some tokens, a line for each; by default of those with the largest values.

        Args:
            positions: of tokens; `range(len(trace.tokens))` for all.
        """
        from rich.table import Table
        from rich.text import Text

        trace = self.trace
        found = Table(box=None, pad_edge=False, header_style="dim")
        names = ["token", f"{max(trace.ngrams)}-gram"]
        for layer_id in trace.layer_ids:
            names += [f"gate {layer_id}", *([f"effect {layer_id}"] if trace.effects else []), f"rows {layer_id}"]
        for name in names:
            found.add_column(name, overflow="fold", justify="left" if name.startswith(("rows", "t")) else "right")
        found.columns[1].justify = "left"
        for position in self.strongest() if positions is None else positions:
            cells = [str(position), quoted(self._ngram(position))]
            for measure in self.measures:
                if measure.is_effect:
                    continue
                cells.append(measure.written(measure.values[position]))
                if trace.effects:
                    gain = trace.effects[measure.layer_id].gain[position]
                    # There is nothing to predict after the last token.
                    cells.append("" if math.isnan(gain) else f"{gain:+.2f}")
                cells.append(" ".join(map(str, trace.row_ids[measure.layer_id][position].tolist())))
            found.add_row(*(Text(_on_grid(cell)) for cell in cells))
        return found

    # Files

    def save(self, path: str | Path) -> Path:
        """Write the view as a page (`.html`) or as a picture (`.png`).

        A picture is taken of the page by Chromium or Chrome where one is installed. Without, matplotlib draws it, and
        a warning says what it cannot draw.

        Args:
            path: of the file; its folder is made.

        Returns:
            the file.

        Raises:
            ValueError: the name ends in something else.
            ImportError: there is neither a browser nor matplotlib.
        """
        path = Path(path)
        if path.suffix not in (".html", ".png"):
            raise ValueError(f"A view is saved as .html or .png, got {path.name!r}.")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".html":
            path.write_text(self.html, encoding="utf-8")
            return path
        page = self._page(self._fragment(" picture", bool(self.dark)), "")
        if not picture_of_page(page, path):
            parts = [(_on_grid(text) or "·", shade) for text, shade in zip(self.trace.tokens, self.measure.shades())]
            is_dark = bool(self.dark)
            picture_of_shades(parts, self._caption(), BLUE[is_dark], ORANGE[is_dark], is_dark, path)
        return path

    def _caption(self) -> str:
        measure = self.measure
        return f"{measure.sentence}, from {measure.written(measure.low)} to {measure.written(measure.high)}"


def _short(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") or "0"


def clean(text: str) -> str:
    """The text without what a page or a terminal would obey: control characters are written as Python writes them."""
    return "".join(_visible(each) for each in text)


def _visible(character: str) -> str:
    is_control = unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
    return ascii(character)[1:-1] if is_control or ord(character) in DIRECTIONS else character


def _direction(line: str) -> str:
    """That of the first letter."""
    ways = (unicodedata.bidirectional(character) for character in line)
    return "rtl" if next((way for way in ways if way in ("L", *RIGHT_TO_LEFT)), "L") in RIGHT_TO_LEFT else "ltr"


def _on_grid(text: str) -> str:
    """For a terminal, where the width of a tab is not known."""
    return clean(text).replace("\t", "    ")


def quoted(text: str) -> str:
    """A piece of text in one line, with visible ends."""
    shown = re.sub(" {3,}", " \u22ef ", clean(text).replace("\n", "\u21b5").replace("\t", "\u21e5"))
    return f"\u201c{shown}\u201d"
