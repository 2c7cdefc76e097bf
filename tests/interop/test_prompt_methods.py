"""PEFT beside tables: prompts that are learned, and models that are prepared for training on few bits."""

import pytest
import torch
from peft import (
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from tiers import REFUSALS, TIERS, load, logits_of
from tiny import assert_same_logits, tiny_config, tiny_ids, tiny_model


CONFIGS = {
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def adapted(kind: str):
    return get_peft_model(tiny_model(), CONFIGS[kind]).eval()


@torch.no_grad()
def expected_logits(model, kind: str, ids: torch.Tensor) -> torch.Tensor:
    """Virtual tokens are seen by attention, and carry no memory."""
    base = model.get_base_model()
    prompts = model.get_prompt(ids.shape[0])
    marked = torch.cat([torch.full((ids.shape[0], 3), -1), ids], dim=1)
    embeddings = torch.cat([prompts, base.get_input_embeddings()(ids)], dim=1)
    return base(inputs_embeds=embeddings, engram_input_ids=marked).logits


@pytest.mark.parametrize("kind", ["prompt", "p"])
def test_learned_prompts_are_right_or_refused_in_a_forward(kind):
    model, ids = adapted(kind), tiny_ids(2, 9)
    expected = expected_logits(model, kind, ids)
    try:
        actual = logits_of(model, ids, attention_mask=torch.ones_like(ids))
    except REFUSALS as error:
        assert "Prompt tuning of PEFT" in str(error)
    else:
        assert_same_logits(actual, expected)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", CONFIGS)
def test_learned_prompts_are_right_or_refused_in_generation(kind):
    model, ids = adapted(kind), tiny_ids(1, 6)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    try:
        generated = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    except REFUSALS as error:
        assert ("Prefix tuning of PEFT" if kind == "prefix" else "Prompt tuning of PEFT") in str(error)
        return
    assert kind != "prefix", "keys and values of a prefix belong to no tokens: nothing says what is right"
    seen = ids
    for _ in range(5):
        seen = torch.cat([seen, expected_logits(model, kind, seen)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, seen)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_a_learned_prefix_is_right_or_refused_in_a_forward():
    """A stock model sees the prefix in its attention only; a memory has nothing to look up there."""
    model, ids = adapted("prefix"), tiny_ids(2, 9)
    try:
        logits = logits_of(model, ids, attention_mask=torch.ones_like(ids))
    except REFUSALS as error:
        assert "Prefix tuning of PEFT" in str(error)
    else:
        # The first memory layer comes before all attention, so it reads what it reads without a prefix.
        gates = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_engram_gates=True).engram_gates[0]
        assert_same_logits(gates, model.get_base_model()(ids, output_engram_gates=True).engram_gates[0])
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize("kind", ["prompt", "p"])
def test_learned_prompts_beside_a_model_without_memory_work(kind):
    plain = tiny_model(tiny_config(engram_layer_ids=[]))
    model, ids = get_peft_model(plain, CONFIGS[kind]).eval(), tiny_ids(1, 6)
    mask = torch.ones_like(ids)
    assert torch.isfinite(logits_of(model, ids, attention_mask=mask)).all()
    generated = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > ids.shape[1]


@pytest.mark.parametrize("tier", TIERS)
def test_preparing_for_few_bits_leaves_a_table_where_its_tier_says(tier, tmp_path):
    """PEFT casts every 16-bit parameter to float32 through `.data`: a table on disk would become memory of its own."""
    tiny_model(tiny_config(engram_table_dtype="bfloat16")).save_pretrained(tmp_path)
    model = load(tmp_path, tier)
    expected = logits_of(model)
    before = {block.name: block for table in model.engram_tables() for block in table.blocks}
    assert {block.tier for block in before.values()} == {tier}
    try:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        actual = logits_of(model)
    except REFUSALS as error:
        assert "table" in str(error) and "float32" in str(error)
        return
    assert_same_logits(actual, expected)
    for table in model.engram_tables():
        for block in table.blocks:
            in_file = before[block.name].nbytes
            is_as_it_was = (block.tier, block.nbytes) == (tier, in_file)
            # Otherwise it says what it is now: twice as large, and in memory.
            assert is_as_it_was or (block.tier != "disk" and block.nbytes == 2 * in_file), block
        blocks = [p for name, p in model.named_parameters() if name.startswith(table.name)]
        assert {block.dtype for block in blocks} == {getattr(torch, table.dtype)}
    model.save_pretrained(tmp_path / "again")
    assert_same_logits(logits_of(load(tmp_path / "again")), expected)
