"""Tokenizers, token maps and fingerprints: one tokenizer per model, and nothing is looked up before it is known."""

import json

import pytest
import torch
from conftest import word_tokenizer
from safetensors.torch import load_file, save_file
from tiny import BACKBONE, tiny_config, tiny_ids, tiny_model
from transformers import AutoModel, AutoModelForCausalLM

from engram_hf import EngramMoEForCausalLM, NgramHash, build_token_map


def bound_model(tokenizer, size="auto", **overrides):
    model = tiny_model(tiny_config(vocab_size=640, engram_compressed_vocab_size=size, **overrides))
    model.bind_tokenizer(tokenizer)
    return model


def test_binding_writes_map_number_and_fingerprint(tokenizer):
    model = bound_model(tokenizer)
    token_map = build_token_map(tokenizer)
    pad = token_map[model.config.engram_pad_token_id]
    assert torch.equal(model.model.ngram_hash.token_map[:600], token_map)
    assert (model.model.ngram_hash.token_map[600:] == pad).all()
    assert model.config.engram_compressed_vocab_size == int(token_map.max()) + 1
    hashing = NgramHash.from_config(model.config, pad_id=int(pad))
    fingerprint = hashing.fingerprint(model.model.ngram_hash.token_map)
    assert {name: model.config.engram_fingerprint[name] for name in fingerprint} == fingerprint
    # The memory reads compressed ids: tokens that differ in case only have the same rows.
    context = [
        model.model.ngram_hash(torch.tensor([[tokenizer.convert_tokens_to_ids(c)]]), torch.zeros(1, 1)) for c in "aA"
    ]
    rows = [c.row_ids[0] for c in context]
    assert torch.equal(*rows)
    assert torch.equal(rows[0], hashing.row_ids(0, token_map[tokenizer.convert_tokens_to_ids("a")].view(1, 1)))


def test_a_forward_before_binding_says_how_to_bind():
    for size in ("auto", 50):
        model = EngramMoEForCausalLM(tiny_config(engram_compressed_vocab_size=size))
        assert model.config.engram_fingerprint is None
        with pytest.raises(ValueError, match=r"Call model.bind_tokenizer\(tokenizer\)"):
            model(tiny_ids(1, 4))


def test_binding_again_is_nothing_new_and_another_tokenizer_is_refused(tokenizer):
    model = bound_model(tokenizer)
    before = dict(model.config.engram_fingerprint)
    model.bind_tokenizer(tokenizer)
    assert model.config.engram_fingerprint == before
    with pytest.raises(ValueError, match="another one is bound.*differs in: ids, map, multipliers"):
        model.bind_tokenizer(word_tokenizer([f"word{i}" for i in range(600)]))
    assert model.config.engram_fingerprint == before and model.config.engram_compressed_vocab_size == int(before["ids"])


def test_what_does_not_fit_is_refused(tokenizer):
    model = EngramMoEForCausalLM(tiny_config(engram_compressed_vocab_size="auto"))
    with pytest.raises(ValueError, match="has 600 ids, the model's vocab_size is 99"):
        model.bind_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="compresses to .* engram_compressed_vocab_size is 50"):
        bound_model(tokenizer, size=50)
    size = int(build_token_map(tokenizer).max()) + 1
    assert bound_model(tokenizer, size=size).config.engram_compressed_vocab_size == size
    with pytest.raises(ValueError, match="hashes raw token ids"):
        bound_model(tokenizer, size=None)
    with pytest.raises(ValueError, match="has no memory"):
        bound_model(tokenizer, engram_layer_ids=[])
    with pytest.raises(ValueError, match="engram_pad_token_id is 620"):
        bound_model(tokenizer, engram_pad_token_id=620)


def test_without_compression_the_fingerprint_is_there_at_once():
    model = EngramMoEForCausalLM(tiny_config())
    assert model.config.engram_fingerprint["map"] == "none"
    assert model.model.ngram_hash.token_map is None


def test_a_bound_model_survives_saving_without_its_tokenizer(tokenizer, tmp_path):
    model = bound_model(tokenizer)
    model.save_pretrained(tmp_path)
    assert "model.ngram_hash.token_map" in load_file(tmp_path / BACKBONE)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(640, (2, 9))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.bind_tokenizer(tokenizer)


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "part"),
    [({"engram_seed": 5}, "multipliers"), ({"engram_pad_token_id": 40}, "pad"), ({"engram_fingerprint": None}, "map")],
)
def test_a_checkpoint_under_another_hash_is_refused(tokenizer, tmp_path, fields, part):
    model = bound_model(tokenizer)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, **fields)
    with pytest.raises(ValueError, match=f"differs in: .*{part}") as error:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.engram_fingerprint["multipliers"] in str(error.value)


def test_a_seed_that_changed_without_compression_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    edit_config(tmp_path, engram_seed=5)
    with pytest.raises(ValueError, match="differs in: multipliers"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_swapped_token_map_is_refused(tokenizer, tmp_path):
    bound_model(tokenizer).save_pretrained(tmp_path)
    weights = load_file(tmp_path / BACKBONE)
    weights["model.ngram_hash.token_map"][300:302] = weights["model.ngram_hash.token_map"][300:302].flip(0)
    save_file(weights, tmp_path / BACKBONE, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="differs in: map"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_state_dict_of_another_tokenizer_is_refused(tokenizer):
    model = bound_model(tokenizer)
    state = model.state_dict()
    fresh = EngramMoEForCausalLM(model.config)
    with pytest.raises(ValueError, match="bind_tokenizer"):
        fresh(tiny_ids(1, 3))
    fresh.load_state_dict(state)
    ids = tiny_ids(2, 7)
    assert torch.equal(fresh(ids).logits, model(ids).logits)
    state["model.ngram_hash.token_map"] = state["model.ngram_hash.token_map"].flip(0)
    with pytest.raises(ValueError, match="the loaded state dict .* differs in: map"):
        fresh.load_state_dict(state)


@pytest.mark.parametrize("compressed", [True, False])
def test_new_token_ids_count_as_padding_and_move_no_row(tokenizer, compressed, tmp_path):
    model = bound_model(tokenizer) if compressed else tiny_model(tiny_config(vocab_size=640))
    ids = torch.randint(3, 600, (2, 9))
    positions = torch.arange(9).unsqueeze(0)
    before = model.model.ngram_hash(ids, positions).row_ids[2]
    model.resize_token_embeddings(700)
    after = model.model.ngram_hash(ids, positions).row_ids[2]
    assert torch.equal(before, after)
    pad, new = torch.full((1, 1), model.config.engram_pad_token_id), torch.full((1, 1), 650)
    rows = [model.model.ngram_hash(token, positions[:, :1]).row_ids[2] for token in (pad, new)]
    assert torch.equal(*rows)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="cannot shrink to 0 ids"):
        model.resize_token_embeddings(0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"engram_seed": 5, "engram_pad_token_id": 7}, "differs in: multipliers, pad"),
        ({"engram_layer_ids": []}, "has no place for"),
        ({"engram_kernel_size": 0}, "has no place for"),
        ({"engram_block_elements": 2**31}, "has no place for|another shape"),
        ({"hc_mult": 4}, "another shape|mismatch"),
    ],
)
def test_a_config_of_ones_own_must_be_that_of_the_checkpoint(tmp_path, fields, message):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=tiny_config(**fields))
    edit_config(tmp_path, engram_fingerprint=None, **fields)
    with pytest.raises((ValueError, RuntimeError), match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_config_without_compression_does_not_fit_a_bound_checkpoint(tokenizer, tmp_path):
    bound_model(tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no place for: ngram_hash.token_map"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, config=tiny_config(vocab_size=640, engram_compressed_vocab_size=None)
        )


def test_tables_keep_their_type_under_a_config_that_declares_none(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, config=tiny_config(), dtype=torch.bfloat16)
    assert model.engram_tables()[0].dtype == "float32"
    with pytest.raises(ValueError, match="is float32, and must be bfloat16"):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=tiny_config(engram_table_dtype="bfloat16"))


def test_a_refused_state_dict_leaves_no_model_that_answers(tokenizer):
    model = bound_model(tokenizer)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    good = {name: tensor.clone() for name, tensor in state.items()}
    state["model.ngram_hash.token_map"] = state["model.ngram_hash.token_map"].flip(0)
    with pytest.raises(ValueError, match="differs in"):
        model.load_state_dict(state)
    with pytest.raises(ValueError, match="no row can be found"):
        model(torch.randint(600, (1, 5)))
    model.load_state_dict(good)
    model(torch.randint(600, (1, 5)))


def test_the_base_model_resizes_its_map(tokenizer, tmp_path):
    base = bound_model(tokenizer).model
    base.resize_token_embeddings(700)
    assert len(base.ngram_hash.token_map) == 700
    base(torch.tensor([[5, 690]]))
    base.save_pretrained(tmp_path)
    assert len(AutoModel.from_pretrained(tmp_path).ngram_hash.token_map) == 700


def test_the_vocabulary_cannot_shrink_below_the_compressed_ids(tokenizer):
    model = bound_model(tokenizer)
    with pytest.raises(ValueError, match="token map has .* different ones"):
        model.resize_token_embeddings(300)


def test_a_model_from_meta_is_whole_after_its_state_dict():
    model = tiny_model()
    with torch.device("meta"):
        twin = EngramMoEForCausalLM(tiny_config())
    twin.to_empty(device="cpu")
    twin.load_state_dict(model.state_dict())
    ids = torch.randint(3, 99, (2, 9))
    twin.model.rotary_emb = model.model.rotary_emb
    torch.testing.assert_close(twin.eval()(ids).logits, model(ids).logits)


def test_drawing_a_bound_model_again_leaves_it_bound(tokenizer, tmp_path):
    model, ids = bound_model(tokenizer), torch.randint(600, (1, 5))
    before = model.model.ngram_hash(ids).row_ids[0]
    model.apply(model._init_weights)
    assert torch.equal(model.model.ngram_hash(ids).row_ids[0], before)
    model.save_pretrained(tmp_path)
    again = EngramMoEForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.ngram_hash(ids).row_ids[0], before)
