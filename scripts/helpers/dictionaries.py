"""Read dictionaries as Debian packages them: an index (`.index`) and the articles, compressed (`.dict.dz`).

A line of the index is a headword, the offset of its article in bytes, and the article's length in bytes, between tabs.
Both numbers are written in base 64, the highest digit first (`man dictfmt`). A `.dict.dz` is a gzip file with a table
of its chunks in the header (`man dictzip`), so gzip reads it.
"""

import gzip
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple


DIGITS = {
    digit: value for value, digit in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
}
# Package to the files of its dictionary.
PACKAGES = {
    "dict-gcide": "gcide",
    "dict-wn": "wn",
    "dict-foldoc": "foldoc",
    "dict-elements": "elements",
    "dict-jargon": "jargon",
}
# Articles about the dictionary itself.
ABOUT_THE_DICTIONARY = re.compile(r"00-?(database|gcide|web1913|dict)", re.IGNORECASE)


class Article(NamedTuple):
    """headword: as the article writes it. parts: its senses or paragraphs, each on one line."""

    headword: str
    parts: list[str]


def fetch_packages(folder: Path) -> list[Path]:
    """Download the packages of all dictionaries into a folder that exists, and return their files.

    Raises:
        OSError: there is no `apt-get`, or it cannot download them.
    """
    try:
        ran = subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise OSError(
            "There is no apt-get here. Download " + ", ".join(PACKAGES) + " from a Debian mirror, and give their "
            "folder with --packages."
        ) from error
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise OSError(f"apt-get could not download {', '.join(PACKAGES)}: {last}")
    return find_packages(folder)


def find_packages(folder: Path) -> list[Path]:
    """The newest file of each package in a folder.

    Raises:
        OSError: one is missing.
    """
    found = []
    for package in PACKAGES:
        files = sorted(folder.glob(f"{package}_*.deb"))
        if not files:
            raise OSError(f"{folder} has no file {package}_*.deb. It needs one of each: {', '.join(PACKAGES)}.")
        found.append(files[-1])
    return found


def unpack(package: Path) -> list[Article]:
    """All articles of a package, cleaned, in the order of the file.

    Raises:
        OSError: `dpkg` cannot unpack it, or it holds no dictionary.
        ValueError: the dictionary is damaged.
    """
    name = PACKAGES[package.name.split("_")[0]]
    with tempfile.TemporaryDirectory() as folder:
        ran = subprocess.run(["dpkg", "-x", str(package), folder], capture_output=True, text=True)
        if ran.returncode:
            raise OSError(f"dpkg could not unpack {package}: {ran.stderr.strip()}. Download the package again.")
        found = list(Path(folder).rglob(f"{name}.index"))
        if not found:
            raise OSError(f"{package} holds no {name}.index. Download the package again.")
        return read_dictionary(found[0], CLEANERS[name])


def read_dictionary(index: Path, clean: Callable[[str], Article | None]) -> list[Article]:
    """Articles of a dictionary, each once, in the order of the file.

    Args:
        index: the `.index`; the articles are beside it.
        clean: makes an article of its text, or nothing.

    Raises:
        ValueError: the index is not one, or does not fit its articles.
    """
    with gzip.open(index.with_suffix(".dict.dz")) as file:
        content = file.read()
    articles = []
    # Other spellings and synonyms point to the same article.
    for start, nbytes in sorted(set(read_index(index))):
        if start + nbytes > len(content):
            raise ValueError(
                f"{index} names an article that ends at byte {start + nbytes}, and its articles have {len(content)} "
                "bytes. Download the package again."
            )
        article = clean(content[start : start + nbytes].decode("utf-8", "replace"))
        if article is not None and article.parts:
            articles.append(article)
    return articles


def read_index(index: Path) -> Iterator[tuple[int, int]]:
    """Offset and length of every article, in bytes, without those about the dictionary.

    Raises:
        ValueError: a line is not one of an index.
    """
    for number, line in enumerate(index.read_text("utf-8", "replace").splitlines(), 1):
        headword, *rest = line.split("\t")
        if len(rest) < 2:
            raise ValueError(
                f"Line {number} of {index} is {line!r:.80}. A headword, an offset and a length must stand in it, "
                "between tabs. Download the package again."
            )
        if not ABOUT_THE_DICTIONARY.match(headword):
            yield decode_number(rest[0]), decode_number(rest[1])


def decode_number(text: str) -> int:
    """A number of an index.

    Raises:
        ValueError: it has a digit that base 64 lacks.

    Example:
        >>> decode_number("BGA")
        4480
    """
    value = 0
    for digit in text:
        if digit not in DIGITS:
            raise ValueError(f"{text!r} is no number of a dictionary's index: {digit!r} is no digit of base 64.")
        value = value * 64 + DIGITS[digit]
    return value


# What is left of an article. Links lose their braces, and every part becomes one line.

# [ae], [=a], [a^], ["o] and the like: how ASCII writes a letter. [L.] says that a word is Latin.
WRITTEN_LETTER = re.compile(
    r"""\[(?:[-=^~`'",.*:+\d]{1,2}(?=[A-Za-z])|(?=(?:ae|oe|th|eth|AE|OE|[A-Za-z]{1,2}[-=^~'`])\]))([A-Za-z]{1,3})[-=^~'`]?\]"""
)
PRONUNCIATION = re.compile(r"\\[^\\]*\\,?")
SPOKEN = re.compile(r"^\([^)]*\)\s*")
# Where a sense comes from, and in its first paragraph where the word comes from.
SOURCES = re.compile(
    r"\[(1913 Webster|Webster 1913 Suppl\.|PJC|WordNet [\d.]+|AS|Century Dict\.[^\]]*|\w+\. ?Dict\.)\]"
)
ETYMOLOGY = re.compile(r"\[[^\]]*\]")
SENSE = re.compile(r"(?:^|\n)\s+(?:(?P<kind>n|v|adj|adv) )?\d+: ")
SYNONYMS = re.compile(r"\s*\[(syn|ant|also): [^\]]*\]")
DATED = re.compile(r"\s*\(\d{4}-\d\d-\d\d\)\s*$")


def one_line(text: str) -> str:
    return " ".join(text.replace("{", "").replace("}", "").split())


def paragraphs(text: str) -> list[str]:
    return [line for part in re.split(r"\n\s*\n", text) if (line := one_line(part))]


def clean_gcide(text: str) -> Article | None:
    headword = re.split(r" \\|\\|\n|, n\.", text, maxsplit=1)[0].strip()
    text = SOURCES.sub("", WRITTEN_LETTER.sub(r"\1", PRONUNCIATION.sub("", text[len(headword) :])))
    first, blank, rest = text.partition("\n\n")
    parts = paragraphs(ETYMOLOGY.sub("", first) + blank + rest)
    parts = [SPOKEN.sub("", part).lstrip(",; ") for part in parts]
    return Article(headword, [part for part in parts if len(part) > 3]) if headword else None


def clean_wn(text: str) -> Article | None:
    headword, _, body = text.partition("\n")
    pieces = SENSE.split("\n" + body)
    # The text before the first sense, then a kind and a text by turns.
    parts = [one_line(SYNONYMS.sub("", sense)) for sense in pieces[2::2]]
    return Article(headword.strip(), [part for part in parts if part])


def clean_foldoc(text: str) -> Article | None:
    headword, _, body = text.partition("\n")
    parts = [DATED.sub("", part) for part in paragraphs(body)]
    return Article(headword.split("%%%")[0].strip(), [part for part in parts if part])


def clean_elements(text: str) -> Article | None:
    headword, _, body = text.strip().partition("\n")
    # Symbol, number and weight have lines of their own; the rest is wrapped.
    lines = body.splitlines()
    facts = [line.strip() for line in lines if re.match(r"(Symbol|Atomic number|Atomic weight):", line)]
    rest = one_line(" ".join(line for line in lines if line.strip() not in facts))
    return Article(headword.strip(), [*facts, rest] if rest else facts) if facts else None


def clean_jargon(text: str) -> Article | None:
    # The second line says how the word is spoken, and what part of speech it is.
    headword, _, body = text.partition("\n")
    return Article(headword.strip(), paragraphs(body.partition("\n")[2]))


CLEANERS = {
    "gcide": clean_gcide,
    "wn": clean_wn,
    "foldoc": clean_foldoc,
    "elements": clean_elements,
    "jargon": clean_jargon,
}
