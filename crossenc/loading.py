"""Load a trained model from an export's folder, a Hub id, or a checkpoint of `fit`."""

from __future__ import annotations

import copy
import json
import sys
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .backbone import has_head, load_config, load_model, load_tokenizer, locate, resolve_max_length
from .calibration import fold
from .errors import BackboneError, CheckpointError, HubError, one_line
from .parts import file_digest, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from .module import CrossEncoderModule

# The files of a model; a repository may hold the weights in other formats too, which are not downloaded. `*` also
# matches `/`, since a bi-encoder keeps further layers in subfolders.
_MODEL_FILES = ("*.json", "*.txt", "*.model", "*model*.safetensors")
_ONNX_FILES = ("onnx/*",)


def load(model: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, int]:
    """Load a model with one logit per pair from a folder (an export's, or that of any sequence classifier with one
    label), a Hub id, or a `.ckpt` file.

    Returns:
        The model, in fp32 and evaluation mode, on the CPU; its tokenizer; and the longest pair in tokens.

    Raises:
        BackboneError: The folder holds no such model.
        CheckpointError: The checkpoint is missing or was not written by crossenc.
        HubError: The Hub is out of reach or has no such model.
    """
    path = find(model)
    if path.is_file():
        _, module, tokenizer = load_checkpoint(path)
        return plain_model(module).train(False), tokenizer, module.max_length
    require_head(str(model), path)
    return load_model(str(path)).train(False), load_tokenizer(str(path)), longest_pair(path)


def plain_model(module: CrossEncoderModule) -> PreTrainedModel:
    """A module's model in the form that any library reads: adapters merged, calibration folded in. Changes the module's
    own model."""
    plain: Any = module.model.merge_and_unload() if module.hparams["lora"] is not None else module.model
    fold(plain, module.calibration)
    return plain  # type: ignore[no-any-return]


def longest_pair(folder: Path) -> int:
    """The length in tokens to which pairs are truncated for a trained model, the same as in sentence-transformers."""
    stored = read_json(folder / "sentence_bert_config.json").get("max_seq_length") or sys.maxsize
    special = load_tokenizer(str(folder)).num_special_tokens_to_add(pair=True)
    if not isinstance(stored, int) or stored < special:
        raise BackboneError(
            f"{folder}: max_seq_length {stored!r} in sentence_bert_config.json must be a whole number from {special} on"
        )
    return min(resolve_max_length(str(folder), None), stored)


def require_head(model: str, folder: Path) -> None:
    """Raise `BackboneError` if a folder's model has no head with one label, or has more than a tokenizer and a model of
    transformers, such as a prompt before the texts."""
    if not has_head(read_json(folder / "config.json").get("architectures")):
        raise BackboneError(f"{model} is not a cross-encoder: it has no classification head; train one with fit")
    load_config(str(folder))  # checks the number of labels
    if prompt := read_json(folder / "config_sentence_transformers.json").get("default_prompt_name"):
        raise BackboneError(f"{model} puts its prompt {prompt!r} before the texts, which crossenc does not support")
    settings, unsupported = read_json(folder / "sentence_bert_config.json"), None
    if settings.get("do_lower_case") and len({str(load_tokenizer(str(folder)).tokenize(text)) for text in "aA"}) > 1:
        unsupported = "do_lower_case"
    elif settings.get("processing_kwargs"):
        unsupported = "processing_kwargs"
    elif len(_layers(folder)) > 1:
        unsupported = "modules.json: layers after the transformer"
    if unsupported:
        raise BackboneError(f"{model} has settings that crossenc does not support ({unsupported})")


def _layers(folder: Path) -> list[Any]:
    """The layers of a model of sentence-transformers; empty if it does not list them."""
    file = folder / "modules.json"
    try:
        layers = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    except ValueError:  # damaged: sentence-transformers itself could not load it
        return []
    return layers if isinstance(layers, list) else []


def find(model: str | Path, onnx: bool = False) -> Path:
    """The path of a checkpoint or of a model's folder; a Hub id is downloaded first, with its ONNX files if `onnx`."""
    model = str(model)
    if model.endswith(".ckpt"):
        if not Path(model).is_file():
            raise CheckpointError(f"{model}: no such checkpoint")
        if onnx:
            raise BackboneError(f"{model} is a checkpoint; write its ONNX files with: crossenc export --onnx")
        return Path(model)
    located = locate(model)
    if Path(located).is_dir():
        return Path(located)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(located, allow_patterns=[*_MODEL_FILES, *(_ONNX_FILES if onnx else ())]))
    except HFValidationError as error:
        raise BackboneError(f"{model} is not a folder, a .ckpt file or a Hub id: {one_line(error)}") from error
    except Exception as error:  # the HTTP library's own too, as in `exporting.upload`
        raise HubError(
            f"model {model} could not be read from the Hugging Face Hub ({one_line(error)}); "
            "give a model on this machine: its folder, package:NAME/PATH, or, for scoring, a .ckpt file"
        ) from error


def fingerprint(path: Path) -> str:
    """A short hash of everything that determines a model's scores: weights, config and tokenizer, or the checkpoint."""
    digest = sha256()
    kinds = (*_MODEL_FILES, *_ONNX_FILES, "*.bin")  # bi-encoders may have weights of the last kind
    files = [path] if path.is_file() else sorted(file for kind in kinds for file in path.rglob(kind))
    for file in filter(Path.is_file, files):
        digest.update(file.name.encode())
        digest.update(file_digest(file).encode())
    return digest.hexdigest()[:16]


def read_threshold(model: str | Path) -> float | None:
    """The threshold stored in a model, at or above which a pair is a duplicate, or None; does not load the weights."""
    path = find(model)
    if path.is_file():
        from .checkpoints import read_checkpoint

        stored = read_checkpoint(path, mmap=True)["crossenc"]
    else:
        stored = read_json(path / "config.json").get("crossenc")
    threshold: float | None = stored.get("threshold") if isinstance(stored, dict) else None
    if not isinstance(threshold, float | int | None):
        raise BackboneError(f"{model}: its stored threshold, {threshold!r}, is no number")
    return threshold


def load_checkpoint(path: Path) -> tuple[dict[str, Any], CrossEncoderModule, PreTrainedTokenizerFast]:
    """A checkpoint's content, its module in evaluation mode, and a copy of its tokenizer, all on the CPU.

    Raises:
        CheckpointError: The file is missing, damaged, or was not written by crossenc; or it is of a subclass that
            computes scores in another way.
    """
    from .checkpoints import read_checkpoint
    from .module import CrossEncoderModule

    loaded = read_checkpoint(path)
    if forward := loaded["crossenc"].get("forward"):
        raise CheckpointError(f"{path} uses the forward of a subclass, {forward}, which an export cannot contain")
    # backbone_sha256 guards the backbone's own weights, but here all weights come from the checkpoint.
    module = CrossEncoderModule.load_from_checkpoint(path, map_location="cpu", weights_only=True, backbone_sha256=None)
    tokenizer = load_tokenizer(module.hparams["backbone"], module.hparams["revision"])
    return loaded, module.eval(), copy.deepcopy(tokenizer)
