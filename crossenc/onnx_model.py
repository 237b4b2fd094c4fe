"""An export's ONNX files: `onnx/model.onnx` in fp32, and `onnx/model_qint8.onnx` with 8-bit weights.

sentence-transformers (`backend="onnx"`, `model_kwargs={"file_name": ...}`) and text-embeddings-inference look there.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import BackboneError, ExportError, one_line, require

FILES = {"onnx": "onnx/model.onnx", "onnx-int8": "onnx/model_qint8.onnx"}
# A protocol buffer holds at most 2 GiB; larger weights go to a file beside it.
_ONE_FILE = 1_900_000_000


def write_onnx(folder: Path, int8: bool) -> None:
    """Add the ONNX files to an export with torch's own exporter: logits of a batch of any size and length.

    Args:
        folder: the export; its weights are read anew, so that the graph is transformers' own.
        int8: also write the file with 8-bit weights; activations are quantised while it runs.

    Raises:
        ExportError: torch cannot export this kind of model.
    """
    import torch
    from torch.export import Dim
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from .backbone import quiet_transformers

    require("onnxscript", "onnx")
    quantization = require("onnxruntime.quantization", "onnx")
    with quiet_transformers():
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    model.config.use_cache = False  # decoders would also return keys and values, which are not outputs of the graph
    # Two pairs of different lengths: a size of one would be taken for a constant.
    inputs = dict(tokenizer([["one", "two"], ["one and two", "three"]], padding=True, return_tensors="pt"))
    file = folder / FILES["onnx"]
    file.parent.mkdir(exist_ok=True)
    # They warn of operators in packages that are not installed, and of places in the code where a graph breaks off.
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx.experimental.symbolic_shapes")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):  # torch prints a broken graph to stderr
            # The exporter warns of its own deprecated calls of pytree, and of axes that share a name.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model.eval(),
                kwargs=inputs,
                f=file,
                input_names=list(inputs),
                output_names=["logits"],
                dynamic_shapes={name: {0: Dim("batch"), 1: Dim("length")} for name in inputs},
                dynamo=True,
                external_data=model.get_memory_footprint() > _ONE_FILE,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, torch._dynamo.exc.TorchDynamoException) as error:
        raise ExportError(
            f"torch cannot export {model.config.model_type} to ONNX: {one_line(error.__cause__ or error)[:300]}"
        ) from error
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)
    if int8:
        with tempfile.TemporaryDirectory(dir=folder) as space:
            prepared = Path(space) / "prepared.onnx"
            # With the weights in a file beside it, or models of more than 2 GiB would fail.
            external = {"save_as_external_data": True, "all_tensors_to_one_file": True}
            quantization.quant_pre_process(file, prepared, skip_symbolic_shape=True, **external)
            quantization.quantize_dynamic(
                prepared, folder / FILES["onnx-int8"], weight_type=quantization.QuantType.QInt8, per_channel=True
            )


def find_onnx(folder: Path, backend: str) -> Path:
    """The file of `onnx` or `onnx-int8` in an export.

    Raises `BackboneError` if there is none, and `MissingExtraError` if onnxruntime is not installed.
    """
    require("onnxruntime", "onnx")
    file = folder / FILES[backend]
    if not file.is_file():
        options = "--onnx --int8" if backend == "onnx-int8" else "--onnx"
        raise BackboneError(f"there is no {file}; write it with: crossenc export CHECKPOINT FOLDER {options}")
    return file


class OnnxModel:
    """An ONNX file of an export, `onnx` or `onnx-int8`, on GPU number `rank`, or on the CPU with `threads` threads."""

    def __init__(self, folder: Path, backend: str, rank: int, threads: int) -> None:
        file = find_onnx(folder, backend)
        runtime = require("onnxruntime", "onnx")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        providers: list[Any] = ["CPUExecutionProvider"]
        if "CUDAExecutionProvider" in runtime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": rank, "use_tf32": 0}))
        try:
            self.session = runtime.InferenceSession(str(file), options, providers=providers)
        except Exception as error:  # onnxruntime's own exceptions have no common base class
            raise BackboneError(f"{file} cannot be read by onnxruntime: {one_line(error)[:300]}") from error
        self.inputs = [item.name for item in self.session.get_inputs()]
        if others := set(self.inputs) - {"input_ids", "attention_mask", "token_type_ids"}:
            raise BackboneError(
                f"{file} takes {min(others)} too; write another with: crossenc export CHECKPOINT FOLDER --onnx"
            )

    def __call__(self, inputs: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """Logits of shape (pairs,) of padded inputs, each of shape (pairs, tokens)."""
        if "token_type_ids" not in inputs:  # torch takes zeros, too, where the tokenizer gives none
            inputs = {**inputs, "token_type_ids": np.zeros_like(inputs["input_ids"])}
        logits: NDArray[np.float32] = self.session.run(["logits"], {name: inputs[name] for name in self.inputs})[0]
        return logits[:, 0]
