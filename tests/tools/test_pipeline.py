"""`pipeline("text-generation")`, with tables on disk: chats in batches, each answered as alone."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline


PROMPTS = ["the list is", "Why does a class have a name, and what is returned by the call of a method?", "int"]


@pytest.mark.parametrize("is_chat", [False, True])
def test_a_pipeline_answers_batches_as_generate_answers_each_alone(checkpoint, is_chat):
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), AutoModelForCausalLM.from_pretrained(checkpoint)
    expected = []
    for prompt in PROMPTS:
        if is_chat:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
        ids = tokenizer(prompt, return_tensors="pt")
        generated = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
        expected.append(tokenizer.decode(generated, skip_special_tokens=True))
    assert len(set(expected)) == len(PROMPTS)

    answering = pipeline("text-generation", str(checkpoint), device_map="cpu+disk")
    assert all(table.tiers.keys() == {"disk"} for table in answering.model.engram_tables())
    asked = [[{"role": "user", "content": prompt}] for prompt in PROMPTS] if is_chat else PROMPTS
    for batch_size in (1, 3):
        answers = answering(asked, batch_size=batch_size, max_new_tokens=12, do_sample=False, return_full_text=False)
        assert [answer[0]["generated_text"] for answer in answers] == expected
