"""The lens and the similarity of layers, against formulas that are written out and the model's own parts."""

import json

import pytest
import torch
from architectures import ARCHITECTURES, FAST, tiny_backbone, with_memory
from cases import slow
from tiny import SHAPES, shaped_config, tiny_ids, tiny_model

from engram_hf import disable_engram
from engram_hf.insight import layer_similarity, logit_lens, similarity
from engram_hf.insight import lens as lens_module
from engram_hf.insight.hidden_layers import collapse_streams, hidden_states, read_out
from engram_hf.insight.similarity import unbiased_cka


DATA = [tiny_ids(1, seq, seed=seq)[0].tolist() for seq in (9, 5, 9)]
KINDS = [
    *FAST,
    "gpt2",
    "deepseek_v4",
    *(slow(kind) for kind in ARCHITECTURES if kind not in (*FAST, "gpt2", "deepseek_v4")),
]


@torch.no_grad()
def states_of(model, ids):
    with hidden_states(model) as states:
        logits = model(ids, use_cache=False).logits
    return [state.clone() for state in states], logits


@pytest.mark.parametrize("shape", SHAPES)
def test_states_are_those_that_the_model_records_before_its_head(shape):
    model, ids = tiny_model(shaped_config(shape)), tiny_ids(2, 7)
    states, logits = states_of(model, ids)
    recorded = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    assert len(states) == len(recorded) == 4
    for state, expected in list(zip(states, recorded))[:-1]:
        assert torch.equal(state.mean(2), expected) or torch.equal(state.squeeze(2), expected)
    head = model.lm_head(model.model.norm(collapse_streams(model, states[-1].flatten(0, 1))))
    torch.testing.assert_close(head, logits.flatten(0, 1), atol=1e-4, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_any_model_reads_its_last_state_out_as_its_own_logits(kind):
    model, ids = with_memory(tiny_backbone(kind)), tiny_ids(2, 7)
    states, logits = states_of(model, ids)
    found = read_out(model, states[-1].flatten(0, 1))
    torch.testing.assert_close(found, logits.flatten(0, 1), atol=1e-4, rtol=1e-4)
    # State 0 is what the first layer is given before the memory is added.
    with disable_engram(model):
        assert torch.equal(states_of(model, ids)[0][0], states[0])
    assert not torch.allclose(read_out(model, states[0].flatten(0, 1)), found, atol=1e-2)


def naive_lens(model, head):
    """KL and agreement of each state, one token at a time, by the parts of the model."""
    kl, same, tokens, settled = [0.0] * 4, [0] * 4, 0, 0
    for ids in DATA:
        states, logits = states_of(model, torch.tensor([ids]))
        for place in range(len(ids)):
            final = logits[0, place].double().softmax(-1)
            first = []
            for i, state in enumerate(states):
                read = head(state[0, place]).double().softmax(-1)
                kl[i] += float((final * (final / read).log()).sum())
                first.append(int(read.argmax()) == int(final.argmax()))
                same[i] += first[-1]
            settled += next(i for i in range(4) if all(first[i:]))
            tokens += 1
    return [each / tokens for each in kl], [each / tokens for each in same], settled / tokens


@torch.no_grad()
@pytest.mark.parametrize(("shape", "batch_tokens", "logits"), [(SHAPES[0], 1, 2**22), (SHAPES[1], 1024, 200)])
def test_the_lens_is_the_head_applied_to_every_state(shape, batch_tokens, logits, monkeypatch):
    monkeypatch.setattr(lens_module, "BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr(lens_module, "LOGITS_AT_ONCE", logits)
    model = tiny_model(shaped_config(shape))

    def head(streams):
        one = streams.squeeze(0) if shape[0] == 1 else model.model.hc_head(streams[None, None])[0, 0]
        return model.lm_head(model.model.norm(one))

    lens = logit_lens(model, DATA)
    curve = lens.curves["with its memory"]
    kl, same, settled = naive_lens(model, head)
    assert curve.kl == pytest.approx(kl, abs=1e-4) and curve.agreement == pytest.approx(same)
    assert curve.settled_after == pytest.approx(settled)
    assert curve.kl[-1] == 0.0 and min(curve.kl[:-1]) > 0.01
    for layer in model.engram_memory().layers:
        torch.nn.init.zeros_(layer.value_proj.weight)
    kl, same, settled = naive_lens(model, head)
    silent = lens.curves["memory silenced"]
    assert silent.kl == pytest.approx(kl, abs=1e-4) and silent.agreement == pytest.approx(same)
    assert json.loads(lens.to_json())["curves"]["memory silenced"]["kl"] == silent.kl


def test_a_model_without_a_memory_has_one_curve():
    lens = logit_lens(tiny_backbone("llama"), DATA)
    assert list(lens.curves) == ["as it is"] and len(lens.curves["as it is"].kl) == lens.layers + 1
    assert "as it is" in str(lens)


def cka_of_kernels(x: torch.Tensor, y: torch.Tensor) -> float:
    """Linear CKA by the estimator of Song et al., term by term, over matrices of tokens x tokens."""

    def hsic(k, m):
        n, one = len(k), torch.ones(len(k), dtype=torch.float64)
        k, m = k - k.diag().diag(), m - m.diag().diag()
        first = (k @ m).trace()
        second = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        third = 2 / (n - 2) * (one @ k @ m @ one)
        return (first + second - third) / (n * (n - 3))

    k, m = x.double() @ x.double().T, y.double() @ y.double().T
    return float(hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt())


def test_cka_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    x = [3 + torch.randn(20, width, generator=generator) for width in (5, 40)]
    y = [x[0] @ torch.randn(5, 7, generator=generator), torch.randn(20, 6, generator=generator) - 2]
    found = unbiased_cka(x, y)
    for i, one in enumerate(x):
        for j, other in enumerate(y):
            assert float(found[i, j]) == pytest.approx(cka_of_kernels(one, other), abs=1e-9)
    assert torch.allclose(unbiased_cka(x, x).diagonal(), torch.ones(2, dtype=torch.float64))


def test_cka_of_what_has_nothing_in_common_is_zero_on_average():
    generator = torch.Generator().manual_seed(0)
    drawn = [[torch.randn(12, 8, generator=generator)] for _ in range(200)]
    found = [float(unbiased_cka(one, other)) for one, other in zip(drawn[::2], drawn[1::2])]
    # The plain estimator would give 0.4 for so few tokens.
    assert abs(sum(found) / len(found)) < 0.05


@pytest.mark.parametrize("kind", ["engram_moe", "llama"])
def test_a_model_resembles_itself_and_a_silenced_one_less(kind):
    model = tiny_model() if kind == "engram_moe" else with_memory(tiny_backbone(kind))
    same = layer_similarity(model, model, DATA)
    assert [row[i] for i, row in enumerate(same.cka)] == pytest.approx([1.0] * 4)
    assert same.tokens == sum(len(ids) - 1 for ids in DATA) and same.alignment == pytest.approx([0, 1, 2, 3])
    silent = layer_similarity(model, None, DATA)
    assert silent.cka[0][0] == pytest.approx(1.0) and silent.cka[3][3] < 0.999
    assert not [name for name, module in model.named_modules() if module._forward_hooks and "engram" in name]


@pytest.mark.parametrize(("batch_tokens", "most_tokens"), [(1024, 2048), (1, 2048), (10, 7)])
def test_similarity_compares_the_tokens_of_two_models(monkeypatch, batch_tokens, most_tokens):
    monkeypatch.setattr(similarity, "BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr(similarity, "MOST_TOKENS", most_tokens)
    one, other = tiny_model(), with_memory(tiny_backbone("llama"))
    expected = []
    for model in (one, other):
        parts = [states_of(model, torch.tensor([ids]))[0] for ids in DATA]
        states = [torch.cat([part[i][0, 1:] for part in parts]) for i in range(4)]
        if most_tokens < len(states[0]):
            states = [state[[i * len(state) // most_tokens for i in range(most_tokens)]] for state in states]
        expected.append(
            [model.model.hc_head(state[None])[0].detach() if state.ndim == 3 else state for state in states]
        )
    found = layer_similarity(one, other, DATA).cka
    for i, x in enumerate(expected[0]):
        for j, y in enumerate(expected[1]):
            assert found[i][j] == pytest.approx(cka_of_kernels(x, y), abs=1e-5)


def test_too_few_tokens_have_no_similarity():
    with pytest.raises(ValueError, match="at least 4 tokens"):
        layer_similarity(tiny_model(), None, [[5, 6, 7]])
    with pytest.raises(ValueError, match="found no memory layer"):
        layer_similarity(tiny_backbone("llama"), None, DATA)


def test_a_model_whose_layers_cannot_be_watched_is_refused():
    compiled, headless = tiny_backbone("llama"), tiny_backbone("llama")
    compiled.model.layers[0].compile()
    with pytest.raises(ValueError, match="This model is compiled"):
        logit_lens(compiled, DATA)
    headless.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="0 lists of 7 modules"):
        layer_similarity(headless, headless, DATA)


def test_pictures_of_depth_are_drawn(tmp_path):
    model = tiny_model()
    lens = logit_lens(model, DATA)
    assert lens.draw(tmp_path / "lens.png", beside=lens).read_bytes().startswith(b"\x89PNG")
    assert layer_similarity(model, None, DATA).draw(tmp_path / "a" / "cka.png").read_bytes().startswith(b"\x89PNG")
