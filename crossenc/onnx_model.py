"""The ONNX form of an export: `onnx/model.onnx` in fp32, and `onnx/model_qint8.onnx` with the weights in 8 bits.

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
# A protocol buffer ends at 2 GiB; larger weights go to a file beside it.
_ONE_FILE = 1_900_000_000


def write_onnx(folder: Path, int8: bool) -> None:
    """Add the ONNX files to an export, by torch's own exporter: logits of a batch of any size and length.

    Args:
        folder: the export, whose weights are read anew: the graph is the plain one of transformers.
        int8: write the file with 8-bit weights too; activations are quantised while it runs.

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
    model.config.use_cache = False  # decoders give back the keys and values too, which are no outputs of a graph
    # Two pairs of unlike length: a size of one would be taken for a constant.
    inputs = dict(tokenizer([["one", "two"], ["one and two", "three"]], padding=True, return_tensors="pt"))
    file = folder / FILES["onnx"]
    file.parent.mkdir(exist_ok=True)
    # Of operators in packages that are not installed; and where a graph breaks off, of places in the code.
    notes = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx.experimental.symbolic_shapes")]
    levels = [log.level for log in notes]
    for log in notes:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):  # to which torch prints the broken graph
            # The exporter's own notes: on pytrees that it calls in an old way, on axes that share a name.
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
        for log, level in zip(notes, levels, strict=True):
            log.setLevel(level)
    if int8:
        with tempfile.TemporaryDirectory(dir=folder) as space:
            prepared = Path(space) / "prepared.onnx"
            # The weights go into a file beside it, without which it takes no model of more than 2 GiB.
            beside = {"save_as_external_data": True, "all_tensors_to_one_file": True}
            quantization.quant_pre_process(file, prepared, skip_symbolic_shape=True, **beside)
            quantization.quantize_dynamic(
                prepared, folder / FILES["onnx-int8"], weight_type=quantization.QuantType.QInt8, per_channel=True
            )


def find_onnx(folder: Path, backend: str) -> Path:
    """The file of `onnx` or `onnx-int8` in an export.

    Raises `BackboneError` if there is none, and `MissingExtraError` if there is no onnxruntime to read it.
    """
    require("onnxruntime", "onnx")
    file = folder / FILES[backend]
    if not file.is_file():
        how = "--onnx --int8" if backend == "onnx-int8" else "--onnx"
        raise BackboneError(f"there is no {file}; write it with: crossenc export CHECKPOINT FOLDER {how}")
    return file


class OnnxModel:
    """One ONNX file of an export, `onnx` or `onnx-int8`, on GPU number `rank` or so many `threads` of the CPU."""

    def __init__(self, folder: Path, backend: str, rank: int, threads: int) -> None:
        file = find_onnx(folder, backend)
        runtime = require("onnxruntime", "onnx")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        providers: list[Any] = ["CPUExecutionProvider"]
        if "CUDAExecutionProvider" in runtime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": rank}))
        try:
            self.session = runtime.InferenceSession(str(file), options, providers=providers)
        except Exception as error:  # onnxruntime's own have no class in common
            raise BackboneError(f"{file} cannot be read by onnxruntime: {one_line(error)[:300]}") from error
        self.inputs = [item.name for item in self.session.get_inputs()]

    def __call__(self, inputs: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """Logits of shape (pairs,) of padded inputs, each of shape (pairs, tokens)."""
        logits: NDArray[np.float32] = self.session.run(["logits"], {name: inputs[name] for name in self.inputs})[0]
        return logits[:, 0]
