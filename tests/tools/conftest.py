"""A checkpoint as a user has it: model, code, tokenizer with a chat template; and where its tables are on disk."""

import pydoc_data.topics
from pathlib import Path

import pytest
from tiny import tiny_config, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def ascii_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer without half characters, so that any ids are the same text in one piece or in many."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    text = (topic.encode("ascii", "ignore").decode() for topic in pydoc_data.topics.topics.values())
    backend.train_from_iterator(text, trainers.BpeTrainer(vocab_size=600, special_tokens=["<pad>", "<bos>", "<eos>"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "engram-tiny"
    tokenizer = ascii_tokenizer()
    model = tiny_model(tiny_config(vocab_size=len(tokenizer), engram_compressed_vocab_size="auto"))
    model.bind_tokenizer(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
