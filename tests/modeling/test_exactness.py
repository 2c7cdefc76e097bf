"""One forward, many ways to compute it: whole, cached, chunked, padded, packed, from embeddings, compiled."""

import pytest
import torch
from cases import slow
from tiny import SHAPES, assert_same_logits, shaped_config, tiny_config, tiny_ids, tiny_model
from transformers import DataCollatorWithFlattening, DynamicCache, StaticCache

from engram_hf import EngramMoEForCausalLM, EngramMoEForSequenceClassification, EngramMoEForTokenClassification


SEQ = 19
CHUNKS = [(0, 1), (1, 6), (6, 7), (7, 9), (9, 18), (18, 19)]


@pytest.fixture(params=SHAPES, ids=lambda shape: "streams{}-order{}-taps{}".format(*shape))
def shape(request):
    return request.param


# Compiling takes seconds. Tests of a compiled model begin with torch._dynamo.reset(): each model counts against one
# limit of recompilations, and sizes that differ from those of the last one are traced as symbols.
COMPILED = [SHAPES[1], *(slow(SHAPES[number]) for number in (0, 2, 3, 4))]


@pytest.fixture
def model(shape):
    return tiny_model(shaped_config(shape))


def chunked_logits(model, ids, chunks, cache=None, **kwargs):
    logits = []
    cache = DynamicCache(config=model.config) if cache is None else cache
    for start, end in chunks:
        here = {name: value[:, start:end] for name, value in kwargs.items()}
        logits.append(model(ids[:, start:end], cache=cache, use_cache=True, **here).logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def test_cached_and_chunked_equal_the_full_forward(model):
    ids = tiny_ids(2, SEQ)
    full = model(ids, use_cache=False).logits
    assert_same_logits(model(ids).logits, full)
    assert_same_logits(chunked_logits(model, ids, [(t, t + 1) for t in range(SEQ)]), full)
    assert_same_logits(chunked_logits(model, ids, CHUNKS), full)
    static = StaticCache(config=model.config, max_cache_len=SEQ + 3)
    assert_same_logits(chunked_logits(model, ids, CHUNKS, static), full)


@torch.no_grad()
@pytest.mark.parametrize("with_position_ids", [True, False])
def test_left_padding_changes_nothing(model, with_position_ids):
    ids = tiny_ids(2, SEQ)
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.int64), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :5] = 0
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if with_position_ids else {}
    expected = model(ids).logits
    assert_same_logits(model(padded, attention_mask=mask, **positions).logits[:, 5:], expected)
    assert_same_logits(model(padded, attention_mask=mask, use_cache=False, **positions).logits[:, 5:], expected)


@torch.no_grad()
def test_rows_of_different_length_padded_left_decode_as_alone(model):
    ids = tiny_ids(2, SEQ)
    alone = torch.cat([model(ids[:1, 4:]).logits[:, -6:], model(ids[1:]).logits[:, -6:]])
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[0, :4], mask[0, :4] = 0, 0
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = []
    for start, end in [(0, 2), (2, 14), (14, 15), (15, SEQ)]:
        here = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
        logits.append(model(padded[:, start:end], cache=cache, **here).logits)
    assert_same_logits(torch.cat(logits, dim=1)[:, -6:], alone)


@torch.no_grad()
def test_right_padding_changes_nothing(model):
    ids = tiny_ids(2, SEQ)
    padded = torch.cat([ids, torch.zeros(2, 4, dtype=torch.int64)], dim=1)
    mask = torch.ones_like(padded)
    mask[:, SEQ:] = 0
    assert_same_logits(model(padded, attention_mask=mask).logits[:, :SEQ], model(ids).logits)


def packed(lengths):
    documents = [tiny_ids(1, length, seed=length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    return documents, torch.cat(documents, dim=1), positions


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [None, False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other(model, use_cache, implementation):
    model.set_attn_implementation(implementation)
    documents, ids, positions = packed([3, 1, 11, 6])
    expected = torch.cat([model(document).logits for document in documents], dim=1)
    outputs = model(ids, position_ids=positions, use_cache=use_cache)
    assert_same_logits(outputs.logits, expected)
    # A cache of several documents has no continuation.
    assert outputs.past_key_values is None
    assert_same_logits(model(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("with_positions", [True, False])
def test_padding_free_batches_of_transformers_collator(model, with_positions):
    documents, _, _ = packed([4, 9, 5])
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=with_positions)
    batch = collator([{"input_ids": document[0].tolist()} for document in documents])
    expected = torch.cat([model(document).logits for document in documents], dim=1)
    assert_same_logits(model(**{**batch, "labels": None}).logits, expected)


@torch.no_grad()
def test_packed_documents_with_a_cache_or_with_padding_are_refused(model):
    _, ids, positions = packed([3, 5])
    with pytest.raises(ValueError, match="cannot share a cache"):
        model(ids, position_ids=positions, cache=DynamicCache(config=model.config))
    mask = torch.ones_like(ids)
    mask[:, -1] = 0
    with pytest.raises(ValueError, match="need attention_mask=None"):
        model(ids, position_ids=positions, attention_mask=mask)


@torch.no_grad()
def test_a_token_without_memory_ends_what_others_see_also_across_a_cache(model):
    """What follows an image span reads its n-grams as if the span were the start; attention sees through it."""
    ids = tiny_ids(1, SEQ)
    memory_ids = ids.clone()
    memory_ids[:, 6:8] = -1
    outputs = model(ids, engram_input_ids=memory_ids, output_engram_gates=True, use_cache=False)
    for gates in outputs.engram_gates:
        assert not gates[:, 6:8].any() and gates[:, 8:].all()
    context = model.model.ngram_hash(memory_ids, torch.arange(SEQ).unsqueeze(0))
    alone = model.model.ngram_hash(ids[:, 8:], torch.arange(SEQ - 8).unsqueeze(0))
    assert torch.equal(context.reach[:, 8:], alone.reach)
    assert torch.equal(context.ngrams[..., 8:], alone.ngrams)
    for chunks in (CHUNKS, [(t, t + 1) for t in range(SEQ)]):
        assert_same_logits(chunked_logits(model, ids, chunks, engram_input_ids=memory_ids), outputs.logits)


@torch.no_grad()
def test_embeddings_with_and_without_ids_beside_them(model):
    ids = tiny_ids(2, SEQ)
    embeddings = model.get_input_embeddings()(ids)
    expected = model(ids).logits
    assert_same_logits(model(inputs_embeds=embeddings, engram_input_ids=ids).logits, expected)
    assert_same_logits(model(inputs_embeds=embeddings).logits, expected)
    embeddings[1, 4] += 1e-3
    with pytest.raises(ValueError, match=r"batch 1, position 4 matches no row .* engram_input_ids"):
        model(inputs_embeds=embeddings)
    with pytest.raises(ValueError, match=r"one id per position, \(2, 19\), got \(2, 3\)"):
        model(inputs_embeds=embeddings, engram_input_ids=ids[:, :3])


@torch.no_grad()
def test_ids_of_32_bits_give_the_same_logits(model):
    ids = tiny_ids(2, SEQ)
    assert torch.equal(model(ids.int()).logits, model(ids).logits)


@torch.no_grad()
def test_a_second_request_sees_nothing_of_the_first(model):
    first, second = tiny_ids(2, SEQ, seed=1), tiny_ids(2, 8, seed=2)
    cache = DynamicCache(config=model.config)
    chunked_logits(model, first, CHUNKS, cache)
    cache.reset()
    assert_same_logits(chunked_logits(model, second, [(0, 3), (3, 8)], cache), model(second).logits)


@torch.no_grad()
def test_the_memory_matters(model):
    ids = tiny_ids(2, SEQ)
    before = model(ids).logits
    for table in model.model.tables():
        for block in table.blocks:
            block.zero_()
    assert (model(ids).logits - before).abs().max() > 0.05 * before.abs().max()


@torch.no_grad()
def test_many_small_blocks_equal_one(shape):
    many = tiny_model(shaped_config(shape))
    one = EngramMoEForCausalLM(shaped_config(shape, engram_block_elements=10**9)).eval()
    state = many.state_dict()
    for layer in (0, 2):
        prefix = f"model.layers.{layer}.engram.table.blocks."
        names = [name for name in state if name.startswith(prefix)]
        assert len(names) > 1
        state[prefix + "0"] = torch.cat([state.pop(name) for name in names])
    one.load_state_dict(state)
    ids = tiny_ids(2, SEQ)
    assert torch.equal(one(ids).logits, many(ids).logits)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(model, use_reentrant):
    def gradients():
        model.zero_grad()
        ids = tiny_ids(2, SEQ)
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.train()
    plain = gradients()
    assert any(".table." in name and grad.any() for name, grad in plain.items())
    # Its new name is not there yet in the oldest release that we support.
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-5, atol=1e-7, msg=name)


# The next test compares logits of a compiled model too.
@pytest.mark.slow
@pytest.mark.parametrize("shape", COMPILED, indirect=True)
@torch.no_grad()
def test_the_compiled_forward_gives_the_same_logits(model):
    torch._dynamo.reset()
    ids = tiny_ids(2, SEQ)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same_logits(compiled(ids, use_cache=False).logits, model(ids).logits)


@pytest.mark.parametrize("shape", COMPILED, indirect=True)
@torch.no_grad()
def test_decoding_with_a_static_cache_is_compiled_once(model):
    torch._dynamo.reset()
    ids = tiny_ids(2, SEQ)
    expected = model(ids).logits
    cache = StaticCache(config=model.config, max_cache_len=SEQ)
    model(ids[:, :5], cache=cache)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for place in range(5, SEQ):
        with torch.compiler.set_stance("default" if place == 5 else "fail_on_recompile"):
            logits = compiled(ids[:, place : place + 1], position_ids=torch.tensor([[place]]), cache=cache).logits
        assert_same_logits(logits, expected[:, place : place + 1])


@pytest.mark.slow
@pytest.mark.parametrize("shape", COMPILED, indirect=True)
@torch.no_grad()
@pytest.mark.parametrize("use_cache", [None, slow(False)])
def test_the_compiled_forward_keeps_packed_documents_apart(model, use_cache):
    documents, ids, positions = packed([3, 1, 11, 6])
    expected = torch.cat([model(document).logits for document in documents], dim=1)
    compiled = torch.compile(model, backend="aot_eager")
    assert_same_logits(compiled(ids, position_ids=positions, use_cache=use_cache).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("shape", COMPILED, indirect=True)
@pytest.mark.parametrize("backend", ["aot_eager", slow("inductor")])
def test_the_compiled_forward_refuses_packed_documents_it_would_mix(shape, backend):
    if backend == "inductor" and shape != SHAPES[0]:
        pytest.skip("half a minute a shape; the assertion is the same")
    torch._dynamo.reset()
    model = tiny_model(shaped_config(shape))
    _, ids, positions = packed([3, 1, 11, 6])
    compiled = torch.compile(model, backend=backend)
    with pytest.raises((ValueError, RuntimeError), match="Leave the cache out"):
        compiled(ids, position_ids=positions, cache=DynamicCache(config=model.config))
    padded = torch.ones_like(ids)
    padded[:, :2] = 0
    with pytest.raises((ValueError, RuntimeError), match="need attention_mask=None"):
        compiled(ids, position_ids=positions, attention_mask=padded, use_cache=False)


@pytest.mark.parametrize("shape", COMPILED, indirect=True)
@torch.no_grad()
def test_the_compiled_forward_gives_no_cache_of_packed_documents(model):
    torch._dynamo.reset()
    _, ids, positions = packed([3, 1, 11, 6])
    assert torch.compile(model, backend="aot_eager")(ids, position_ids=positions).past_key_values is None


@pytest.mark.slow
@pytest.mark.parametrize("shape", COMPILED, indirect=True)
@torch.no_grad()
def test_the_compiled_forward_takes_positions_beside_a_cache_or_padding(model):
    torch._dynamo.reset()
    ids, positions = tiny_ids(2, SEQ), torch.arange(SEQ).expand(2, -1)
    compiled = torch.compile(model, backend="aot_eager")
    cache = DynamicCache(config=model.config)
    assert_same_logits(compiled(ids, position_ids=positions, cache=cache).logits, model(ids).logits)
    mask = torch.ones_like(ids)
    mask[:, :4] = 0
    shifted = (mask.cumsum(-1) - 1).clamp_min(0)
    padded = compiled(ids, position_ids=shifted, attention_mask=mask, use_cache=False).logits
    assert_same_logits(padded[:, 4:], model(ids[:, 4:]).logits)


@pytest.mark.slow
@torch.no_grad()
def test_the_forward_compiled_by_inductor_gives_the_same_logits():
    model = tiny_model()
    ids = tiny_ids(2, SEQ)
    assert_same_logits(torch.compile(model)(ids, use_cache=False).logits, model(ids).logits)


@torch.no_grad()
@torch.no_grad()
def test_a_cache_made_without_a_config_changes_nothing():
    model, ids, cache = tiny_model(), tiny_ids(2, 9), DynamicCache()
    pieces = [model(ids[:, start:end], cache=cache).logits for start, end in ((0, 4), (4, 5), (5, 9))]
    assert_same_logits(torch.cat(pieces, 1), model(ids).logits)


@torch.no_grad()
def test_a_cache_that_holds_tokens_that_the_memory_has_not_read_is_refused():
    model, plain = tiny_model(), tiny_model(tiny_config(engram_layer_ids=[]))
    cache = plain(tiny_ids(1, 3), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds 3 tokens that the memory has not read"):
        model(tiny_ids(1, 1), cache=cache)


@torch.no_grad()
def test_recorded_outputs_have_the_documented_shapes(model, shape):
    outputs = model(
        tiny_ids(2, SEQ), output_engram_gates=True, output_hidden_states=True, output_router_logits=True, labels=None
    )
    assert [tuple(gates.shape) for gates in outputs.engram_gates] == [(2, SEQ, shape[0])] * 2
    assert [tuple(hidden.shape) for hidden in outputs.hidden_states] == [(2, SEQ, 32)] * 4
    assert [tuple(logits.shape) for logits in outputs.router_logits] == [(2 * SEQ, 4)] * 2
    assert outputs.aux_loss > 0
    assert model(tiny_ids(2, SEQ)).engram_gates is None


def test_the_auxiliary_loss_is_added_where_router_logits_are_asked_for():
    model = tiny_model(tiny_config(router_aux_loss_coef=0.5))
    ids = tiny_ids(2, SEQ)
    plain, with_aux = model(ids, labels=ids), model(ids, labels=ids, output_router_logits=True)
    torch.testing.assert_close(with_aux.loss, plain.loss + 0.5 * with_aux.aux_loss)


@pytest.mark.parametrize("head", [EngramMoEForSequenceClassification, EngramMoEForTokenClassification])
def test_classification_heads_train(head):
    model = head(tiny_config(num_labels=3))
    labels = torch.tensor([0, 2]) if head is EngramMoEForSequenceClassification else torch.randint(3, (2, 7))
    model(tiny_ids(2, 7), labels=labels).loss.backward()
    assert model.score.weight.grad.any() and model.model.tables()[0].blocks[0].grad.any()
