"""A trace says what a plain forward does, and its effects are those of ordinary forwards with a layer silenced."""

import json

import numpy as np
import pytest
import torch
from architectures import tiny_backbone, with_memory
from cases import slow
from safetensors.torch import save_file
from tiny import SHAPES, VOCAB_SIZE, shaped_config, tiny_config, tiny_model

from engram_hf import add_patch, make_patch, set_patches, use_patches
from engram_hf.insight import show, tracing
from engram_hf.insight.silencing import silenced
from engram_hf.insight.tracing import trace
from engram_hf.modeling.modeling_engram_moe import CACHE_NAME


IDS = torch.randint(3, VOCAB_SIZE, (1, 23), generator=torch.Generator().manual_seed(5))
WORDS = [f"w{i:02d} " for i in range(VOCAB_SIZE)]
TEXT = "".join(WORDS[i] for i in IDS[0])


class Words:
    """A tokenizer whose token `i` is `WORDS[i]`."""

    def __call__(self, text):
        return {"input_ids": [WORDS.index(f"{word} ") for word in text.split()]}

    def decode(self, ids, **options):
        return "".join(WORDS[i] for i in ids)

    def convert_ids_to_tokens(self, ids):
        return [WORDS[i] for i in ids]


def trace_of(model, **given):
    return trace(model, Words(), TEXT, **given)


@torch.no_grad()
def naive_trace(model, ids, **given) -> dict[int, dict]:
    """What the memory layers are given and give in a plain forward, at the last tokens of its first row."""
    found, hooks = {}, []
    for layer in model.engram_memory().layers:

        def look(layer, args, output):
            streams, added = args[0][0], output[0][0]
            norm = torch.linalg.vector_norm(added, dim=(1, 2))
            share = norm / torch.linalg.vector_norm(streams + added, dim=(1, 2))
            new = {"gates": output[1][0], "row_ids": args[1][0], "norms": norm, "share": share}
            old = found.get(layer.layer_idx)
            found[layer.layer_idx] = new if old is None else {k: torch.cat([old[k], new[k]]) for k in new}

        hooks.append(layer.register_forward_hook(look))
    for chunk in ids if isinstance(ids, list) else [ids]:
        model(chunk, **given)
    for hook in hooks:
        hook.remove()
    return found


def assert_same_trace(actual, expected: dict[int, dict], where=slice(None)) -> None:
    assert actual.layer_ids == sorted(expected)
    for layer_id, of_layer in expected.items():
        assert np.array_equal(actual.row_ids[layer_id], of_layer["row_ids"][where].numpy())
        for name in ("gates", "norms", "share"):
            torch.testing.assert_close(torch.tensor(getattr(actual, name)[layer_id]), of_layer[name][where])


@torch.no_grad()
def naive_effects(model, layer_id: int) -> tuple[list[float], list[float], list[float]]:
    """An ordinary forward per position, with the layer silenced there."""
    plain = model(IDS).logits[0].double().log_softmax(-1)
    log_prob, silent_log_prob, kl = [], [], []
    for t in range(IDS.shape[1]):
        with silenced(model, layers=[layer_id], positions=[t]):
            silent = model(IDS).logits[0, t].double().log_softmax(-1)
        kl.append(float((plain[t].exp() * (plain[t] - silent)).sum()))
        if t + 1 < IDS.shape[1]:
            log_prob.append(float(plain[t, IDS[0, t + 1]]))
            silent_log_prob.append(float(silent[IDS[0, t + 1]]))
    return log_prob, silent_log_prob, kl


def assert_same_effects(model, found) -> None:
    for layer_id in found.layer_ids:
        effect, (log_prob, silent_log_prob, kl) = found.effects[layer_id], naive_effects(model, layer_id)
        assert np.isnan(effect.log_prob[-1]) and np.isnan(effect.silenced_log_prob[-1])
        np.testing.assert_allclose(effect.log_prob[:-1], log_prob, atol=1e-4)
        np.testing.assert_allclose(effect.silenced_log_prob[:-1], silent_log_prob, atol=1e-4)
        np.testing.assert_allclose(effect.kl, kl, atol=1e-4)
        np.testing.assert_allclose(effect.gain, effect.log_prob - effect.silenced_log_prob)
        assert effect.kl.mean() > 0.01, "effects that are all 0 would hide a wrong one"


@pytest.fixture
def few_copies(monkeypatch):
    """So few tokens share a forward that a text needs several."""
    monkeypatch.setattr(tracing, "COPIED_TOKENS", 5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_trace_is_what_a_plain_forward_does(shape):
    model = tiny_model(shaped_config(shape))
    assert_same_trace(trace_of(model, effects=False), naive_trace(model, IDS))


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_a_trace_is_what_cached_padded_and_packed_forwards_do(shape):
    model, found = tiny_model(shaped_config(shape)), trace_of(tiny_model(shaped_config(shape)), effects=False)
    cached = {CACHE_NAME: getattr(model(IDS[:, :1]), CACHE_NAME)}
    after_first = naive_trace(model, list(IDS[:, 1:].split(1, 1)), **cached)
    for layer_id, of_layer in after_first.items():
        torch.testing.assert_close(torch.tensor(found.gates[layer_id][1:]), of_layer["gates"])
        assert np.array_equal(found.row_ids[layer_id][1:], of_layer["row_ids"].numpy())
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), IDS], 1)
    assert_same_trace(found, naive_trace(model, padded, attention_mask=(padded > 0).long()), slice(4, None))
    packed, positions = torch.cat([IDS.flip(1), IDS], 1), torch.arange(23).repeat(2).unsqueeze(0)
    assert_same_trace(found, naive_trace(model, packed, position_ids=positions), slice(23, None))


@pytest.mark.parametrize("shape", SHAPES)
def test_effects_are_those_of_an_ordinary_forward_per_position(shape, few_copies):
    model = tiny_model(shaped_config(shape))
    assert_same_effects(model, trace_of(model))


@pytest.mark.parametrize(
    "kind",
    ["llama", "gemma3_text", "falcon", slow("bloom"), slow("mamba2"), slow("lfm2"), slow("gpt_neo"), slow("opt")],
)
def test_effects_of_an_added_memory_are_those_too_whatever_its_backbone_attends_to(kind, few_copies):
    model = with_memory(tiny_backbone(kind))
    assert_same_effects(model, trace_of(model))


@pytest.mark.parametrize(("kind", "is_copied"), [("engram_moe", True), ("llama", True), ("gemma3_text", False)])
def test_copies_cost_a_few_tokens_per_token_where_the_attention_can_be_told_whom_to_see(kind, is_copied, few_copies):
    model = tiny_model() if kind == "engram_moe" else with_memory(tiny_backbone(kind))
    tokens = []
    hook = model.register_forward_pre_hook(
        lambda m, a, given: tokens.append(given["input_ids"].numel()), with_kwargs=True
    )
    trace_of(model)
    hook.remove()
    # The plain forward, the tokens again, copies for two layers and copies that are not silenced; and the first token.
    assert (sum(tokens) <= 5 * IDS.numel() + 10) is is_copied


def test_a_forward_for_each_token_is_never_large(monkeypatch):
    monkeypatch.setattr(tracing, "BATCH_TOKENS", 60)
    model, tokens = with_memory(tiny_backbone("mamba2")), []
    hook = model.register_forward_pre_hook(
        lambda m, a, given: tokens.append(given["input_ids"].shape), with_kwargs=True
    )
    trace_of(model)
    hook.remove()
    # Of several tokens; a forward for one has all that are before it.
    several = [rows * seq for rows, seq in tokens if rows > 1]
    assert len(several) > 5 and max(several) <= 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_that_see_too_little_are_noticed(dtype, monkeypatch, few_copies):
    model, whole = tiny_model().to(dtype), tracing._mask_of_copies
    right = trace_of(model).effects

    def blind(before, *given):
        mask = whole(before, *given)
        mask[:, : max(0, before - 3)] = False
        return mask

    monkeypatch.setattr(tracing, "_mask_of_copies", blind)
    for layer_id, effect in trace_of(model).effects.items():
        np.testing.assert_allclose(effect.gain, right[layer_id].gain, atol=1e-4 if dtype == torch.float32 else 0.1)


def test_statistics_are_not_looked_for_in_the_folder_at_hand(tmp_path, monkeypatch):
    (tmp_path / "row_statistics.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert trace_of(tiny_model(), effects=False).trained is None


def test_a_trace_leaves_the_model_as_it_was():
    model = tiny_model().train()
    model.model.layers[1].eval()
    before = {name: (module.training, len(module._forward_hooks)) for name, module in model.named_modules()}
    trace_of(model)
    assert {n: (m.training, len(m._forward_hooks)) for n, m in model.named_modules()} == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_ngrams_are_the_text_that_a_token_sees(tokenizer):
    model = tiny_model(shaped_config((1, 4, 3), vocab_size=600))
    found = trace(model, tokenizer, "the end of the line", effects=False)
    ids = tokenizer("the end of the line")["input_ids"]
    assert list(found.token_ids) == ids
    for order in (2, 3, 4):
        assert found.ngrams[order] == [tokenizer.decode(ids[max(0, i + 1 - order) : i + 1]) for i in range(len(ids))]


TEXTS = ["for i in range(3):\n\treturn i", "naïve façade", "日本語 と 한국어", "👩\u200d👩\u200d👧 and 🙂", "שלום עולם"]


@pytest.mark.parametrize("text", [*TEXTS, "a\ufffdb \ufffd", "\ufffd" * 9])
def test_texts_of_tokens_are_the_text_in_pieces_and_no_half_characters(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    found = tracing.texts_of_tokens(tokenizer, ids)
    assert "".join(found) == text and len(found) == len(ids)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in found)


def test_a_text_that_ends_inside_of_a_character_says_so(tokenizer):
    ids = tokenizer("a🙂")["input_ids"][:-1]
    assert "".join(tracing.texts_of_tokens(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_trace_is_json_with_null_where_there_is_no_next_token():
    found = trace_of(tiny_model())
    content = json.loads(found.to_json())
    assert content["tokens"] == found.tokens and content["effects"]["2"]["log_prob"][-1] is None
    np.testing.assert_allclose(content["gates"]["0"], found.gates[0], atol=1e-6)
    assert json.loads(trace_of(tiny_model(), effects=False).to_json())["effects"] is None


def test_a_trace_says_which_rows_training_has_looked_up(tmp_path):
    model = tiny_model()
    file, plain = tmp_path / "row_statistics.safetensors", trace_of(model, effects=False)
    assert plain.trained is None
    tables = {layer.layer_idx: layer.table for layer in model.engram_memory().layers}
    touched = {f"{i}.touched": torch.rand(table.num_rows) < 0.5 for i, table in tables.items()}
    save_file(touched, file)
    for where in (file, tmp_path):
        found = trace_of(model, effects=False, statistics=where)
        for layer_id in tables:
            starts = [0, *np.cumsum(found.rows_of_heads[layer_id])[:-1]]
            for head, start in enumerate(starts):
                rows = found.row_ids[layer_id][:, head] + start
                assert found.trained[layer_id][:, head].tolist() == touched[f"{layer_id}.touched"][rows].tolist()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert trace_of(again, effects=False).trained is not None
    save_file({"0.touched": torch.ones(3), "2.touched": torch.ones(3)}, file)
    with pytest.raises(ValueError, match="counts 3 rows in layer 0, and the table there has"):
        trace_of(model, effects=False, statistics=file)
    with pytest.raises(FileNotFoundError, match="EngramRowStatisticsCallback writes"):
        trace_of(model, effects=False, statistics=tmp_path / "nowhere")


def test_what_cannot_be_traced_is_said_in_a_sentence():
    with pytest.raises(ValueError, match="The text has no token"):
        trace(tiny_model(), Words(), "")
    with pytest.raises(ValueError, match="found no memory layer"):
        trace_of(tiny_model(tiny_config(engram_layer_ids=[])))
    with pytest.raises(ValueError, match="is compiled"):
        trace_of(torch.compile(tiny_model()))


def test_rows_that_a_patch_changes_are_marked():
    model = tiny_model()
    plain = trace_of(model, effects=False)
    assert plain.patched is None
    for layer_id, row_ids in plain.row_ids.items():
        first_rows = np.cumsum(plain.rows_of_heads[layer_id]) - plain.rows_of_heads[layer_id]
        in_table = torch.from_numpy(np.unique((row_ids + first_rows)[2:5]))
        name = f"layers.{layer_id}.engram.table"
        add_patch(model, make_patch(model, f"of {layer_id}", {name: (in_table, torch.ones(len(in_table), 8))}))
        found = trace_of(model, effects=False)
        expected = np.isin(row_ids + first_rows, in_table.numpy())
        assert expected.any() and not expected.all() and np.array_equal(found.patched[layer_id], expected)
        heads = expected.shape[1]
        assert json.loads(found.to_json())["patched"][str(layer_id)][2] == [True] * heads
    assert f"({heads} of {heads} patched)" in show(found).detail(2)
    # A request of one sequence sees what it asks for, and nothing else.
    last = layer_id
    set_patches(model, [])
    assert trace_of(model, effects=False).patched is None
    with use_patches(model, [f"of {last}"]):
        asked = trace_of(model, effects=False).patched
    assert np.array_equal(asked[last], expected) and not any(asked[each].any() for each in asked if each != last)
