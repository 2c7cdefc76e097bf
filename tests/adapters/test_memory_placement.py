"""A memory in a model that accelerate has placed, and in one that sees images."""

import pytest
import torch
from accelerate import dispatch_model
from architectures import draw, memory_layers, tiny_backbone, tiny_memory, with_memory
from transformers import AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from engram_hf import add_engram, remove_engram


LAYERS_ON_DISK = {
    **dict.fromkeys(["model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"], "cpu"),
    "model.layers.0": "disk",
    "model.layers.2": "disk",
}


def some_ids(batch: int = 2, seq: int = 9) -> torch.Tensor:
    return torch.randint(3, 97, (batch, seq), generator=torch.Generator().manual_seed(0))


def test_a_memory_is_added_to_a_model_whose_layers_are_offloaded(tmp_path):
    expected, ids = with_memory(tiny_backbone("llama"))(some_ids()).logits, some_ids()
    model = dispatch_model(
        tiny_backbone("llama"), LAYERS_ON_DISK, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
    )
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    add_engram(model, tiny_memory())
    assert {p.device.type for layer in memory_layers(model) for p in layer.parameters()} == {"cpu"}
    draw(model, 1, "default")
    torch.testing.assert_close(model(ids).logits, expected)
    torch.testing.assert_close(
        model.generate(ids, max_new_tokens=3, do_sample=False),
        with_memory(tiny_backbone("llama")).generate(ids, max_new_tokens=3, do_sample=False),
    )
    remove_engram(model)
    torch.testing.assert_close(model(ids).logits, tiny_backbone("llama")(ids).logits)


def test_a_whole_model_is_loaded_with_hooks_of_accelerate(tmp_path):
    model, ids = with_memory(tiny_backbone("llama")), some_ids()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto", attn_implementation="eager").eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    dispatched = dispatch_model(loaded, {"": "cpu"}, force_hooks=True)
    assert torch.equal(dispatched(ids).logits, model(ids).logits)


@pytest.fixture
def llava():
    """A model of images and text, whose text decoder is a Llama."""
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "projection_dim": 16,
    }
    text = tiny_backbone("llama").config.to_dict()
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=98, image_seq_length=4, pad_token_id=0)
    torch.manual_seed(0)
    return draw(LlavaForConditionalGeneration(config), 0).eval()


def test_images_are_no_tokens_of_a_memory(llava):
    model, ids = with_memory(llava), some_ids()
    ids[:, 2:6] = 98
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    marked = ids.masked_fill(ids == 98, -1)
    logits = model(ids, pixel_values=images).logits
    assert torch.equal(model(ids, pixel_values=images, engram_input_ids=marked).logits, logits)
    other = marked.clone()
    other[:, 6:] = 7
    assert not torch.equal(model(ids, pixel_values=images, engram_input_ids=other).logits, logits)
    options = {"pixel_values": images, "max_new_tokens": 4, "do_sample": False}
    ways = [model.generate(ids, **options, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*ways)
    first = model.generate(ids[:1], pixel_values=images[:1], max_new_tokens=4, do_sample=False)
    assert torch.equal(first, ways[0][:1])
