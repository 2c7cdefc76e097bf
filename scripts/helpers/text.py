"""Text to train on. By default that is the Python standard library of the running interpreter: nothing is downloaded.

The text differs between releases of Python, so compare losses only of runs on the same interpreter. Whole documents are
held out, never parts of a document that is trained on.
"""

import ast
import sysconfig
from itertools import chain, islice
from pathlib import Path
from pydoc_data.topics import topics

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


Document = tuple[str, str]  # name, text

# Folders of the standard library that hold tests, tables of numbers, or packages that others installed.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"}
TEXT_COLUMNS = ("text", "content")
# Enough for these models. A data set of the Hub is read up to here.
MAX_CHARACTERS = 20_000_000
# A plain text file is cut into documents of at most this length. A short file is cut into shorter ones, so that
# enough documents are left to hold one out.
DOCUMENT_CHARACTERS = 8_000
HELD_OUT_EVERY = 16
# A line of this length or more that stands in two texts was copied.
COPIED_LINE_CHARACTERS = 30
# A chat as plain text, so that chat tools can be tried. The small models here have learnt no chat.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{{ eos_token if message.role == 'assistant' else '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
DATASET_HELP = (
    "a .txt or .jsonl file, a folder of files, or a data set of the Hub as NAME or NAME:SUBSET (needs a network)"
)


def gather_documents() -> list[Document]:
    """Sources of the standard library, sorted by name, and the topics of Python's `help()`."""
    documents = _library_sources()
    # Topics quote each other, so they are one document: none is held out while another is trained on.
    documents.append(("pydoc topics", "\n\n".join(topics[name] for name in sorted(topics))))
    return documents


def gather_docstrings() -> list[Document]:
    """Docstrings of the standard library, those of a file as one document, sorted by name."""
    documents = []
    for name, source in _library_sources():
        try:
            tree = ast.parse(source)
        except SyntaxError:
            # Some files are templates.
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        documents.append((name, "\n\n".join(docstring for docstring in found if docstring)))
    return [(name, text) for name, text in documents if text.strip()]


def _library_sources() -> list[Document]:
    library = Path(sysconfig.get_path("stdlib"))
    files = [path.relative_to(library) for path in sorted(library.rglob("*.py"))]
    names = [name for name in files if not SKIPPED_FOLDERS & set(name.parts)]
    return [(name.as_posix(), (library / name).read_text("utf-8", "replace")) for name in names]


# Suffix of a local file with rows to the builder of `datasets` that reads it.
TABLE_FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


def load_documents(name_or_path: str) -> list[Document]:
    """Documents of a file, of a folder of files, or of any data set that `datasets` can load.

    Raises:
        ValueError: there is no such file, or it holds no text.
    """
    path = Path(name_or_path)
    if not path.exists() and (path.suffix in {*TABLE_FILES, ".txt"} or name_or_path.startswith((".", "/", "~"))):
        raise ValueError(f"There is no file or folder {name_or_path}. Give {DATASET_HELP}.")
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".")]
        documents = [(str(file), file.read_text("utf-8", "replace")) for file in files]
    elif path.is_file() and path.suffix in TABLE_FILES:
        builder = TABLE_FILES[path.suffix]
        documents = _rows_of(load_dataset(builder, data_files=str(path), split="train", streaming=True), name_or_path)
    elif path.is_file():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError as error:
            kinds = ", ".join(TABLE_FILES)
            raise ValueError(f"{path} is neither text in UTF-8 nor one of {kinds} ({error}).") from error
        length = min(DOCUMENT_CHARACTERS, len(text) // HELD_OUT_EVERY + 1)
        documents = [(f"{path}[{start}]", text[start : start + length]) for start in range(0, len(text), length)]
    else:
        name, _, subset = name_or_path.partition(":")
        documents = _rows_of(load_dataset(name, subset or None, split="train", streaming=True), name_or_path)
    documents = [(name, text) for name, text in documents if text and text.strip()]
    if not documents:
        raise ValueError(f"{name_or_path} holds no text. Give {DATASET_HELP}.")
    return documents


def _rows_of(dataset, name: str) -> list[Document]:
    """Documents of a streamed data set, up to MAX_CHARACTERS of text."""
    columns = dataset.column_names or list(next(iter(dataset)))
    column = next((column for column in TEXT_COLUMNS if column in columns), None)
    if column is None:
        raise ValueError(
            f"{name} has the columns {columns}, and none is called {' or '.join(TEXT_COLUMNS)}. Rename one."
        )
    documents, characters = [], 0
    for index, row in enumerate(dataset):
        documents.append((f"{name}[{index}]", row[column]))
        characters += len(row[column] or "")
        if characters >= MAX_CHARACTERS:
            break
    return documents


def split_documents(documents: list[Document], every: int = HELD_OUT_EVERY) -> tuple[list[Document], list[Document]]:
    """Documents to train on, and every sixteenth document (or as `every` says), which is held out.

    Raises:
        ValueError: there are too few documents to hold one out.
    """
    held_out = documents[every // 2 :: every]
    if not held_out:
        raise ValueError(f"{len(documents)} documents are too few to hold one out; give more than {every // 2}.")
    train = [document for i, document in enumerate(documents) if i % every != every // 2]
    return train, held_out


def drop_copied(held_out: list[Document], train: list[Document]) -> list[Document]:
    """Held-out documents without the paragraphs that stand in the text to train on, as a whole or in a long line."""
    copied = {line.strip() for _, text in train for line in text.splitlines()}
    copied = {line for line in copied if len(line) >= COPIED_LINE_CHARACTERS}
    whole = {paragraph.strip() for _, text in train for paragraph in text.split("\n\n")}

    def is_new(paragraph: str) -> bool:
        return paragraph.strip() not in whole and not any(line.strip() in copied for line in paragraph.splitlines())

    kept = [(name, "\n\n".join(filter(is_new, text.split("\n\n")))) for name, text in held_out]
    return [(name, text) for name, text in kept if text.strip()]


def train_tokenizer(documents: list[Document], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over these documents, with a chat template; ids 0, 1 and 2 are pad, begin and end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((text for _, text in documents), trainer, length=len(documents))
    special_tokens = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **special_tokens)


def packed_dataset(tokenizer, documents: list[Document], seq_length: int) -> Dataset:
    """Documents one after the other, each ended by eos, cut into rows of `seq_length` ids. The rest is dropped.

    Raises:
        ValueError: the documents do not fill one row.
    """
    ids_of_documents = tokenizer([text for _, text in documents], add_special_tokens=False)["input_ids"]
    ids = chain.from_iterable([*document_ids, tokenizer.eos_token_id] for document_ids in ids_of_documents)
    rows = []
    while len(row := list(islice(ids, seq_length))) == seq_length:
        rows.append(row)
    if not rows:
        raise ValueError(f"{len(documents)} documents do not fill one row of {seq_length} ids. Give more text.")
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def rows_of_documents(
    tokenizer, documents: list[Document], seq_length: int, most_rows: int
) -> tuple[torch.Tensor, list[str]]:
    """Ids (rows, seq_length) of which each row is of one document, and the names of the documents.

    The rest of a document is dropped. Where there are too many rows, those that are left are spread over all documents.

    Raises:
        ValueError: no document fills a row.
    """
    rows, names = [], []
    for name, text in documents:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        own = [ids[start : start + seq_length] for start in range(0, len(ids) - seq_length + 1, seq_length)]
        rows += own
        names += [name] * len(own)
    if not rows:
        raise ValueError(f"None of {len(documents)} held-out documents fills {seq_length} ids. Give longer documents.")
    spread = [i * len(rows) // most_rows for i in range(most_rows)] if len(rows) > most_rows else range(len(rows))
    return torch.tensor([rows[i] for i in spread]), [names[i] for i in spread]
