"""ONNX by transformers' exporter is exact; other ways to ONNX, tables off the device and GGUF are refused aloud."""

import pytest
import torch
from extra import needs
from tiny import assert_same_logits, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM

from engram_hf import EngramMoEForCausalLM


class WithoutCache(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids, use_cache=False).logits


def on_disk(folder):
    tiny_model().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu+disk").eval()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_the_onnx_of_transformers_gives_the_same_logits_at_every_size():
    needs("onnx", "onnxscript", "onnxruntime")
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    model = tiny_model()

    def inputs(batch, seq, padding):
        mask = torch.ones(batch, seq, dtype=torch.int64)
        mask[0, :padding] = 0
        return {"input_ids": tiny_ids(batch, seq, seed=seq), "attention_mask": mask}

    exported = OnnxExporter().export(model, inputs(2, 9, 3), config=OnnxConfig(dynamic=True))
    for size in ((2, 9, 0), (3, 23, 7), (1, 60, 0), (1, 1, 0)):
        given = inputs(*size)
        is_token = given["attention_mask"] > 0
        logits = torch.as_tensor(exported(**given)["logits"])
        assert_same_logits(logits[is_token], model(**given).logits[is_token])


@torch.no_grad()
def test_torch_export_gives_the_same_logits():
    model, ids = WithoutCache(tiny_model()).eval(), tiny_ids(2, 9)
    program = torch.export.export(model, (ids,), strict=False)
    assert_same_logits(program.module()(ids), model(ids))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False])
def test_torch_onnx_export_is_refused_and_names_the_exporter_that_works(tmp_path, dynamo):
    needs("onnx", "onnxscript")
    model = WithoutCache(tiny_model()).eval()
    with pytest.raises(Exception, match=r"OnnxExporter\(\).export\(model, inputs\)"):
        torch.onnx.export(model, (tiny_ids(2, 9),), tmp_path / "model.onnx", dynamo=dynamo)


def test_tables_off_the_device_are_not_exported(tmp_path):
    model = WithoutCache(on_disk(tmp_path)).eval()
    with pytest.raises(ValueError, match="on disk cannot be exported.*without entries for tables"):
        torch.export.export(model, (tiny_ids(2, 9),), strict=False)


def test_gguf_is_refused(tmp_path):
    model = tiny_model()
    for load in (EngramMoEForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="GGUF has no memory layers, so model.gguf.*quantize_tables"):
            load(tmp_path, config=model.config, gguf_file="model.gguf")


def test_a_gguf_that_says_it_is_ours_is_refused(tmp_path):
    needs("gguf")
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "engram_moe")
    writer.add_block_count(3)
    writer.add_tensor("token_embd.weight", torch.zeros(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="architecture engram_moe is not supported"):
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")


def test_continuous_batching_is_refused():
    model = tiny_model()
    assert not hasattr(model, "init_continuous_batching")
    for start in (model.generate_batch, model.continuous_batching_context_manager):
        with pytest.raises(NotImplementedError, match="Continuous batching is not supported.*padded on the left"):
            start([[5, 6, 7]])
