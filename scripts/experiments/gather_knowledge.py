"""Gather the text of the experiments: articles full of facts, split so that held-out articles share no text.

    python scripts/experiments/gather_knowledge.py                     a minute, downloads 29 MB from a Debian mirror
    python scripts/experiments/gather_knowledge.py --packages FOLDER   the .deb files are there already
    python scripts/experiments/gather_knowledge.py --dataset NAME      any data set of the Hub, or files, in their place

The default text is five dictionaries that Debian packages (GCIDE, WordNet, FOLDOC, The Elements, the Jargon File) and
Python's standard library. Their licenses differ from this repository's, so they are fetched and never committed. A
dictionary is cleaned of markup. A sense that an earlier article has, word for word, is dropped. One word in 16 is held
out, in all dictionaries alike, and a held-out part that shares eight words in a row with a trained one is dropped.

The folder gets train.jsonl and held_out.jsonl, tasks with known answers, and manifest.json with sizes and digests. It
appears when it is whole: a run that was killed leaves nothing.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.dictionaries import PACKAGES, fetch_packages, find_packages, unpack
from helpers.knowledge import (
    Entry,
    choose_facts,
    choose_reading,
    drop_repeated,
    entries_of,
    entries_of_documents,
    split_entries,
)
from helpers.results import ROOT
from helpers.text import DATASET_HELP, gather_documents, load_documents


FOLDER = ROOT / "output" / "knowledge"
MANIFEST = "manifest.json"
TRAIN, HELD_OUT = "train.jsonl", "held_out.jsonl"


def gather_dictionaries(packages: Path | None) -> tuple[list[Entry], dict[str, str]]:
    """Articles of all dictionaries and pieces of Python's library, and the digest of each package.

    Raises:
        OSError: a package cannot be downloaded or read.
        ValueError: a dictionary is damaged.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = find_packages(packages) if packages is not None else fetch_packages(Path(folder))
        entries = [entry for file in files for entry in entries_of(PACKAGES[file.name.split("_")[0]], unpack(file))]
        digests = {file.name: digest(file) for file in files}
    return entries + entries_of_documents("python", gather_documents()), digests


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_corpus(entries: list[Entry], digests: dict[str, str], output: Path) -> dict:
    """Clean, split, choose tasks, and write a folder that appears when it is whole. Returns the manifest.

    Raises:
        ValueError: nothing is left to train on or to hold out.
    """
    train, held_out = split_entries(drop_repeated(entries))
    if not train or not held_out:
        raise ValueError(
            f"{len(entries)} articles leave {len(train)} to train on and {len(held_out)} held out. Give more text."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        write_lines(unfinished / "facts_trained.jsonl", [asdict(fact) for fact in choose_facts(train)])
        write_lines(unfinished / "facts_held_out.jsonl", [asdict(fact) for fact in choose_facts(held_out)])
        write_lines(unfinished / "reading.jsonl", [asdict(fact) for fact in choose_reading(held_out)])
        write_lines(unfinished / TRAIN, [entry.as_json() for entry in train])
        write_lines(unfinished / HELD_OUT, [entry.as_json() for entry in held_out])
        manifest = {
            "packages": digests,
            "articles": {name: sizes(part) for name, part in ((TRAIN, train), (HELD_OUT, held_out))},
            "files": {path.name: digest(path) for path in sorted(unfinished.glob("*.jsonl"))},
        }
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        # mkdtemp gives the folder to this user alone.
        unfinished.chmod(0o755)
        if output.exists():
            shutil.rmtree(output)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return manifest


def sizes(entries: list[Entry]) -> dict[str, dict[str, int]]:
    """Articles and characters of each source."""
    articles, characters = Counter(entry.source for entry in entries), Counter()
    for entry in entries:
        characters[entry.source] += len(entry.text)
    return {name: {"articles": articles[name], "characters": characters[name]} for name in sorted(articles)}


def show(manifest: dict, output: Path) -> None:
    for file, by_source in manifest["articles"].items():
        print(f"\n{file}")
        for source, size in by_source.items():
            print(f"  {source:<10}{size['articles']:>10,} articles{size['characters']:>14,} characters")
    print("\nsha256")
    for name, own in {**manifest["packages"], **manifest["files"]}.items():
        print(f"  {own}  {name}")
    print(f"\nwrote {output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help=f"{DATASET_HELP}, in place of the dictionaries")
    parser.add_argument("--packages", type=Path, help="folder with the .deb files (default: they are downloaded)")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder to write (default: output/knowledge)")
    arguments = parser.parse_args()
    if arguments.output.exists() and not (arguments.output / MANIFEST).is_file() and any(arguments.output.iterdir()):
        raise SystemExit(f"{arguments.output} holds files of something else; name another folder with --output.")
    try:
        if arguments.dataset is not None:
            # Named by number: which are held out must not depend on the folder that they lie in.
            documents = [(f"{place}", text) for place, (_, text) in enumerate(load_documents(arguments.dataset))]
            entries, digests = entries_of_documents("dataset", documents), {}
        else:
            entries, digests = gather_dictionaries(arguments.packages)
        show(write_corpus(entries, digests, arguments.output), arguments.output)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
