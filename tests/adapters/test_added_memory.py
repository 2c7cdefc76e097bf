"""Adding a memory changes nothing until it is trained, taking it out leaves nothing, and what it says is right."""

import copy
import pickle
import threading

import pytest
import torch
from architectures import draw, memory_layers, tiny_backbone, tiny_memory, with_memory
from naive import naive_memory, naive_row_ids
from test_public_names import smoothed
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.cache_utils import DynamicCache

from engram_hf import (
    EngramConfig,
    add_engram,
    disable_engram,
    freeze_backbone,
    record_gates,
    remove_engram,
    set_engram,
)
from engram_hf.adapters.memory_class import decoder_of
from engram_hf.modeling.modeling_engram_moe import CACHE_NAME


def some_ids(batch: int = 2, seq: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 99, (batch, seq), generator=torch.Generator().manual_seed(seed))


def everything(model) -> dict:
    """What a model is: its class, its attributes, its modules with their hooks, its tensors."""
    modules = {}
    for name, module in model.named_modules():
        hooks = [list(value.values()) for key, value in vars(module).items() if key.endswith("_hooks")]
        marks = [len(value) for key, value in vars(module).items() if key.endswith(("_with_kwargs", "_always_called"))]
        modules[name] = (type(module), sorted(vars(module)), hooks, marks)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {"modules": modules, "tensors": tensors, "config": model.config.to_dict()}


def assert_same(actual: dict, expected: dict) -> None:
    assert actual["modules"] == expected["modules"] and actual["config"] == expected["config"]
    assert actual["tensors"].keys() == expected["tensors"].keys()
    assert all(torch.equal(actual["tensors"][name], expected["tensors"][name]) for name in expected["tensors"])


@pytest.mark.parametrize("model_type", ["llama", "falcon", "gemma3_text"])
def test_taking_a_memory_out_gives_the_model_back_bit_for_bit(model_type):
    model, ids = tiny_backbone(model_type), some_ids()
    before, logits = everything(model), model(ids).logits
    with_memory(model)
    assert not torch.equal(model(ids).logits, logits)
    assert type(model).__name__ == type(tiny_backbone(model_type)).__name__
    with disable_engram(model):
        assert torch.equal(model(ids).logits, logits)
        assert torch.equal(model.generate(ids, max_new_tokens=2)[:, :9], ids)
    remove_engram(model)
    assert_same(everything(model), before)
    assert torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize("start", ["silent", "loud_rows", "random"])
def test_a_new_memory_changes_nothing_and_gets_a_gradient(start):
    model, ids = tiny_backbone("llama"), some_ids()
    before = model(ids).logits
    add_engram(model, tiny_memory(start=start))
    logits = model(ids).logits
    assert torch.equal(logits, before) is (start != "random")
    logits.square().mean().backward()
    learning = {"silent": "table", "loud_rows": "value_proj", "random": "table"}[start]
    for layer in memory_layers(model):
        assert all(parameter.grad.any() for parameter in getattr(layer, learning).parameters() if parameter.ndim > 1)


def test_rows_that_were_never_trained_add_nothing():
    model, ids, others = tiny_backbone("llama"), some_ids(1), torch.full((1, 2), 5)
    before = model(others).logits
    add_engram(model, tiny_memory(vocab_size=5003))
    optimizer = torch.optim.SGD(freeze_backbone(model).parameters(), lr=1.0)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model(ids).logits, tiny_backbone("llama")(ids).logits)
    assert torch.equal(model(others).logits, before)


def test_a_memory_computes_what_its_specification_says():
    model, ids = with_memory(tiny_backbone("llama")), some_ids(1, 11)
    ngram_hash, layer = model.engram_memory().ngram_hash, memory_layers(model)[1]
    given, said = [], []
    hook = layer.register_forward_hook(lambda module, args, output: given.append(args[0]) or said.append(output[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    rows = naive_row_ids(ids[0].tolist(), list(range(11)), ngram_hash.multipliers(2), ngram_hash.primes(2), 0)
    with torch.no_grad():
        expected = naive_memory(layer, given[0][0], rows, 1e-6)
    torch.testing.assert_close(said[0][0], expected, atol=1e-5, rtol=1e-5)


def test_what_a_layer_says_is_added_to_its_input():
    model, ids = with_memory(tiny_backbone("llama")), some_ids(1)
    layer, seen = memory_layers(model)[1], {}
    block = model.model.layers[2]
    hooks = [
        layer.register_forward_hook(lambda module, args, output: seen.update(before=args[0], said=output[0])),
        block.input_layernorm.register_forward_pre_hook(lambda module, args: seen.update(after=args[0])),
    ]
    with torch.no_grad():
        model(ids)
    assert torch.equal(seen["after"], (seen["before"] + seen["said"]).squeeze(2)) and len(hooks) == 2


def test_several_memories_have_names_and_one_is_read():
    model, ids = with_memory(tiny_backbone("llama")), some_ids()
    first = model(ids).logits
    add_engram(model, tiny_memory(layer_ids=[1], vocab_size=31), name="other")
    draw(model, 3, "other")
    other = model(ids).logits
    set_engram(model, "default")
    again = model(ids).logits
    assert not torch.equal(other, first)
    assert torch.equal(again, first)
    remove_engram(model, "default")
    assert torch.equal(model(ids).logits, other)
    with pytest.raises(ValueError, match="no memory called 'default'; it has other"):
        set_engram(model, "default")
    remove_engram(model, "other")
    with pytest.raises(ValueError, match="has no added memory. Add one"):
        remove_engram(model)


def test_a_cache_that_another_memory_has_read_is_refused():
    model, ids = with_memory(tiny_backbone("llama")), some_ids()
    cache = DynamicCache(config=model.config)
    model(ids, **{CACHE_NAME: cache})
    with disable_engram(model):
        model(ids, **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match="holds 18 tokens that the memory has not read"):
        model(ids, **{CACHE_NAME: cache})


@pytest.mark.parametrize("model_type", ["llama", "falcon"])
def test_copies_pickles_and_threads_are_right(model_type):
    model, ids = with_memory(tiny_backbone(model_type)), some_ids()
    expected = {seed: model(some_ids(seed=seed)).logits.detach() for seed in range(4)}
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert torch.equal(other(ids).logits, expected[0])
        remove_engram(other)
        assert torch.equal(other(ids).logits, tiny_backbone(model_type)(ids).logits)
    assert torch.equal(model(ids).logits, expected[0])
    found = {}

    def run(seed):
        for _ in range(5):
            found[seed] = model(some_ids(seed=seed)).logits.detach()

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], expected[seed]) for seed in range(4))


def test_a_forward_that_fails_leaves_nothing_behind():
    model, ids = with_memory(tiny_backbone("falcon")), some_ids()
    expected = model(ids).logits
    with pytest.raises(ValueError, match="must be below vocab_size"):
        model(torch.full((1, 3), 99))
    hook = model.transformer.h[1].register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids)
    hook.remove()
    with pytest.raises(RuntimeError, match="called outside of its model"):
        model.transformer.h[0](torch.zeros(1, 2, 32), attention_mask=None, alibi=None)
    assert torch.equal(model(ids).logits, expected)


def test_gates_are_recorded_in_outputs_and_in_a_context():
    model, ids = with_memory(tiny_backbone("llama")), some_ids()
    with record_gates(model) as recorded:
        outputs = model(ids, output_engram_gates=True, output_hidden_states=True)
        base_outputs = model.model(ids, output_engram_gates=True)
        as_tuple = model(ids, output_engram_gates=True, return_dict=False)
    assert [gates.shape for gates in outputs.engram_gates] == [(2, 9, 1)] * 2
    assert len(outputs.hidden_states) == 4 and "engram_gates" not in model(ids)
    for i, layer_id in enumerate((0, 2)):
        for gates in (outputs.engram_gates, base_outputs.engram_gates, as_tuple[-1]):
            assert torch.equal(gates[i], recorded[0][layer_id])
    falcon = with_memory(tiny_backbone("falcon"))
    with record_gates(falcon) as recorded:
        falcon.generate(ids, max_new_tokens=3)
    assert [gates[0].shape[1] for gates in recorded] == [9, 1, 1]


def test_the_memory_reads_ids_given_beside_embeddings():
    model, ids = with_memory(tiny_backbone("llama")), some_ids()
    embeddings = model.get_input_embeddings()(ids)
    marked = ids.clone()
    marked[:, 4] = -1
    expected = model(ids, engram_input_ids=marked).logits
    assert torch.equal(model(inputs_embeds=embeddings, engram_input_ids=marked).logits, expected)
    assert not torch.equal(model(ids).logits, expected)
    with pytest.raises(ValueError, match="matches no row of the embedding matrix. Pass the token ids beside"):
        model(inputs_embeds=embeddings + 0.1)
    with pytest.raises(ValueError, match="must have one id per position"):
        model(ids, engram_input_ids=marked[:, :3])


def test_packed_rows_are_kept_apart_and_refused_beside_a_cache():
    model, ids = with_memory(tiny_backbone("llama")), some_ids(1)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    alone = torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], 1)
    # By default transformers makes a cache here, and its attention would mix the documents.
    torch.testing.assert_close(model(ids, position_ids=positions).logits, alone, atol=1e-5, rtol=1e-5)
    mask = torch.ones_like(ids)
    packed = model(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="cannot share a cache"):
        model(ids, position_ids=positions, **{CACHE_NAME: DynamicCache(config=model.config)})


def test_a_memory_in_the_text_decoder_of_a_composite_model():
    text = tiny_backbone("llama").config
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "projection_dim": 16,
    }
    config = LlavaConfig(vision_config=vision, text_config=text.to_dict(), image_token_id=98, pad_token_id=0)
    model, ids = LlavaForConditionalGeneration(config).eval(), some_ids(2).clamp_max(97)
    before, logits = everything(model), model(ids).logits
    with_memory(model)
    after = model(ids).logits
    assert not torch.equal(after, logits)
    assert set(model.named_tables()) == {f"language_model.layers.{i}.engram.default.table" for i in (0, 2)}
    torch.manual_seed(0)
    ways = [model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*ways)
    remove_engram(model)
    assert_same(everything(model), before)


def test_a_model_without_a_head_can_have_a_memory():
    head, ids = tiny_backbone("llama"), some_ids()
    model = head.model
    stock, before = type(model), everything(model)["tensors"]
    with_memory(model)
    outputs = model(ids, output_hidden_states=True, output_engram_gates=True)
    assert len(outputs.hidden_states) == 4 and len(outputs.engram_gates) == 2
    remove_engram(model)
    after = everything(model)["tensors"]
    assert type(model) is stock and after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_label_smoothing_shifts_labels_as_for_the_backbone(tmp_path):
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    model, ids = with_memory(tiny_backbone("llama")), some_ids()
    loss = Trainer(model, arguments).compute_loss(model, {"input_ids": ids, "labels": ids})
    torch.testing.assert_close(loss.double(), smoothed(model(ids).logits, ids, 0.1), atol=1e-6, rtol=0)


def test_a_memory_merges_ids_by_a_tokenizer_and_refuses_others(tokenizer):
    config = tiny_memory(compressed_vocab_size="auto")
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        add_engram(tiny_backbone("llama", vocab_size=600), config)
    with pytest.raises(ValueError, match="The tokenizer has 600 ids, the model's vocab_size is 99"):
        add_engram(tiny_backbone("llama"), config, tokenizer)
    model = add_engram(tiny_backbone("llama", vocab_size=640), config, tokenizer)
    own = decoder_of(model).engram.config("default")
    assert own.compressed_vocab_size < 600 and own.fingerprint["tokens"] == "600"
    assert config.compressed_vocab_size == "auto" and config.fingerprint is None
    ngram_hash = model.engram_memory().ngram_hash
    row_ids = [ngram_hash(torch.tensor([[tokenizer.convert_tokens_to_ids(c)]])).row_ids for c in "aA"]
    assert torch.equal(row_ids[0][0], row_ids[1][0])
    model.bind_tokenizer(tokenizer)
    again = add_engram(tiny_backbone("llama", vocab_size=640), own, tokenizer)
    assert decoder_of(again).engram.config("default") == own


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_ids": [3]}, r"^layer_ids must be different zero-based layer ids in \[0, 3\), got \[3\]"),
        ({"pad_token_id": 99}, r"^pad_token_id must be a raw token id in \[0, 99\), got 99"),
        ({"compressed_vocab_size": 100}, r"^compressed_vocab_size must be .auto., None or an int in \[1, 99\]"),
    ],
)
def test_a_memory_that_does_not_fit_the_model_is_refused(fields, message):
    model = tiny_backbone("llama")
    before = everything(model)
    with pytest.raises(ValueError, match=message):
        add_engram(model, tiny_memory(**fields), object())
    assert_same(everything(model), before)


def test_what_cannot_be_exact_is_refused():
    model = with_memory(tiny_backbone("llama"))
    with pytest.raises(ValueError, match="a memory called 'default' already"):
        add_engram(model, tiny_memory())
    for name in ("a.b", "keys", ""):
        with pytest.raises(ValueError, match="A memory's name is letters"):
            add_engram(model, tiny_memory(), name=name)
    with pytest.raises(ValueError, match=r"keeps its state in a transformers Cache, and \w+ is a list"):
        model.model(some_ids(), **{CACHE_NAME: [1]})
    with pytest.raises(ValueError, match="added to a model of transformers"):
        add_engram(torch.nn.Linear(2, 2), tiny_memory())
    with pytest.raises(ValueError, match="'model.nothing' names no module of LlamaForCausalLM"):
        add_engram(tiny_backbone("llama"), tiny_memory(), layers="model.nothing")
    compiled = tiny_backbone("llama")
    compiled.compile()
    with pytest.raises(ValueError, match="This model is compiled. Add or remove a memory first"):
        add_engram(compiled, tiny_memory())


def test_layers_that_are_not_found_can_be_named():
    model = tiny_backbone("llama")
    model.model.layers = torch.nn.ModuleList([*model.model.layers, torch.nn.Identity()])
    with pytest.raises(ValueError, match=r"3 decoder layers .* were not found in its LlamaModel, .*: layers \(4\)"):
        add_engram(model, tiny_memory())
    add_engram(model, tiny_memory(), layers="model.layers")
    assert list(model.named_tables()) == [f"layers.{i}.engram.default.table" for i in (0, 2)]


def test_only_the_memory_learns_after_freezing_the_backbone():
    model = freeze_backbone(with_memory(tiny_backbone("llama")))
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names and all(".engram." in name for name in names)
    assert names == {name for name, _ in model.named_parameters() if ".engram." in name}
    with disable_engram(model), pytest.raises(ValueError, match="is disabled, so it cannot learn"):
        freeze_backbone(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_memory_computes_in_its_own_type(dtype):
    model, ids = tiny_backbone("llama").to(dtype), some_ids()
    before = model(ids).logits
    add_engram(model, tiny_memory())
    assert {p.dtype for layer in memory_layers(model) for p in layer.parameters()} == {torch.float32}
    assert torch.equal(model(ids).logits, before) and before.dtype == dtype
    draw(model, 1, "default")
    assert model(ids).logits.isfinite().all()


def test_adding_a_memory_draws_from_the_random_numbers_that_its_weights_need():
    """One forward runs at the head of the model to look at it, in the mode in which the model is."""
    states = []
    for dropout in (0.0, 0.5):
        model = tiny_backbone("gpt2", embd_pdrop=dropout).train()
        torch.manual_seed(3)
        add_engram(model, tiny_memory())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_configs_round_trip_and_refuse_what_cannot_be():
    config = tiny_memory(vocab_size=(31, 53), rms_norm_eps=1)
    assert EngramConfig.from_dict(config.to_dict()) == config and config.vocab_size == [31, 53]
    for fields, message in [
        ({"n_heads": "two"}, "n_heads cannot be 'two'"),
        ({"head_dim": 0}, r"^head_dim must lie in \[1, 1048576\], got 0"),
        ({"layer_ids": []}, "layer_ids must name at least one layer"),
        ({"layer_ids": [1, 1]}, "layer_ids must be different"),
        ({"vocab_size": [53]}, "vocab_size must be one number, or one for each of the 2 orders"),
        ({"kernel_size": -1}, r"kernel_size must lie in \[0, 256\]"),
        ({"table_dtype": "int3"}, "table_dtype must be None or one of"),
        ({"start": "loud"}, "start must be one of silent"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be above 0"),
        ({"compressed_vocab_size": "all"}, 'compressed_vocab_size must be "auto"'),
        ({"fingerprint": {"ids": 3}}, "fingerprint must hold strings"),
        ({"heads": 3}, "'heads' is no field of EngramConfig. Did you mean n_heads"),
    ]:
        with pytest.raises(ValueError, match=message):
            EngramConfig.from_dict({**tiny_memory().to_dict(), **fields})
    with pytest.raises(ValueError, match="EngramConfig needs vocab_size, n_heads, head_dim"):
        EngramConfig.from_dict({"layer_ids": [1]})


@pytest.mark.parametrize("parameters", [20_000, 300_000])
def test_defaults_of_a_model_have_as_many_parameters_as_asked(parameters):
    model = tiny_backbone("llama", num_hidden_layers=6)
    config = EngramConfig.for_model(model, table_parameters=parameters, compressed_vocab_size=None)
    assert config.layer_ids == [1, 3]
    add_engram(model, config)
    total = sum(table.rows * table.head_dim for table in model.engram_tables())
    assert parameters * 0.95 <= total <= parameters
    with pytest.raises(ValueError, match="is too small for 32 hash heads"):
        EngramConfig.for_model(model, table_parameters=100)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: MiniMaxForCausalLM(small_config(MiniMaxConfig)), "cache is not a transformers Cache"),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
            ),
            "it has an encoder",
        ),
    ],
)
def test_architectures_whose_state_has_no_place_are_refused(model, why):
    with pytest.raises(ValueError, match=f"would decode wrongly, because .*{why}"):
        add_engram(model(), tiny_memory(layer_ids=[0]))


def small_config(config_class):
    return config_class(
        vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8
    )


def test_continuous_batching_is_refused_and_back_without_the_memory():
    model = tiny_backbone("llama")
    assert hasattr(model, "init_continuous_batching")
    with_memory(model)
    assert not hasattr(model, "init_continuous_batching")
    with pytest.raises(NotImplementedError, match="Continuous batching is not supported"):
        model.generate_batch([[5, 6]])
    remove_engram(model)
    assert hasattr(model, "init_continuous_batching")


def test_each_residual_stream_has_a_gate():
    model, ids = with_memory(tiny_backbone("deepseek_v4")), some_ids()
    with record_gates(model) as gates:
        model(ids)
    assert [gates[0][layer].shape for layer in (0, 2)] == [(2, 9, 2)] * 2
    assert not torch.equal(gates[0][0][..., 0], gates[0][0][..., 1])
