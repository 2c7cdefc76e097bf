"""What a model with memory layers is asked by other tools and cannot do: a sentence instead of an error from within."""

import torch


class WithoutContinuousBatching:
    """Part of `EngramMoEForCausalLM`: transformers pages keys and values only, and a memory also keeps the last ids."""

    @property
    def init_continuous_batching(self):
        # `transformers serve` looks for this name, and where it is missing answers one request after another.
        if self.config.engram_layer_ids:
            raise AttributeError(f"{type(self).__name__} has no continuous batching.")
        return super().init_continuous_batching

    def generate_batch(self, *args, **kwargs):
        """As in transformers, for a model without memory layers.

        Raises:
            ValueError: there are memory layers.
        """
        self._refuse_continuous_batching()
        return super().generate_batch(*args, **kwargs)

    def continuous_batching_context_manager(self, *args, **kwargs):
        """As in transformers, for a model without memory layers.

        Raises:
            ValueError: there are memory layers.
        """
        self._refuse_continuous_batching()
        return super().continuous_batching_context_manager(*args, **kwargs)

    def _refuse_continuous_batching(self) -> None:
        if self.config.engram_layer_ids:
            raise ValueError(
                "Continuous batching pages keys and values, and a memory layer also keeps the last ids, which have no "
                "pages. Call generate with a batch of prompts padded on the left: it gives what each gives alone."
            )


def refuse_export(is_resident: bool) -> None:
    """Called where a table is read.

    Raises:
        ValueError: torch is exporting the model in a way that cannot hold this table.
    """
    # Where `torch.onnx.export` fails it tries `strict=True`, under which nothing tells that it is asking.
    is_strict = torch.compiler.is_exporting() and torch.compiler.is_dynamo_compiling()
    if torch.onnx.is_in_onnx_export() or is_strict:
        raise ValueError(
            "torch.onnx.export knows no cummax and no grouped products, which this model needs. transformers' own "
            "exporter does: OnnxExporter().export(model, inputs), from transformers.exporters.exporter_onnx. "
            "torch.export.export works with strict=False."
        )
    if not is_resident and torch.compiler.is_exporting():
        raise ValueError(
            "A table in host memory or on disk cannot be exported: its rows are read outside of the graph. Load the "
            "model without entries for tables in device_map, and the graph holds them."
        )


def refuse_gguf(gguf_file: str | None) -> None:
    """
    Raises:
        ValueError: weights are to come from a GGUF file.
    """
    if gguf_file is not None:
        raise ValueError(
            f"GGUF has no memory layers, so {gguf_file} cannot hold this model. Load its safetensors folder; to make "
            "it smaller, quantize tables with quantize_tables and the backbone with a quantization_config."
        )
