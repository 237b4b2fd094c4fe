"""Load a trained model from whatever holds it: an export's folder, a Hub id, or a checkpoint of `fit`."""

from __future__ import annotations

import copy
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

# What a model consists of, also in a bi-encoder's folders of further layers (`*` stands for `/` too); a repository may
# hold its weights in other forms too.
_MODEL_FILES = ("*.json", "*.txt", "*.model", "*model*.safetensors")
_ONNX_FILES = ("onnx/*",)


def load(model: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, int]:
    """A model that gives one logit to a pair, in fp32 and evaluation mode, on the CPU; its tokenizer, and the longest
    pair in tokens. Of an export's folder (or any single-label sequence classifier's), a Hub id, or a `.ckpt` file.

    Raises:
        BackboneError: the folder holds no such model.
        CheckpointError: the checkpoint is missing or was not written by crossenc.
        HubError: the Hub is out of reach or has no such model.
    """
    path = find(model)
    if path.is_file():
        _, module, tokenizer = load_checkpoint(path)
        return plain_model(module).train(False), tokenizer, module.max_length
    require_head(str(model), path)
    return load_model(str(path)).train(False), load_tokenizer(str(path)), longest_pair(path)


def plain_model(module: CrossEncoderModule) -> PreTrainedModel:
    """A module's model for any reader: adapters merged, calibration folded in. The module's own model is changed."""
    plain: Any = module.model.merge_and_unload() if module.hparams["lora"] is not None else module.model
    fold(plain, module.calibration)
    return plain  # type: ignore[no-any-return]


def longest_pair(folder: Path) -> int:
    """The most tokens of a pair that a trained model reads, as sentence-transformers cuts it."""
    known: int | None = read_config(folder, "sentence_bert_config.json").get("max_seq_length")
    return min(resolve_max_length(str(folder), None), known or sys.maxsize)


def require_head(model: str, folder: Path) -> None:
    """Raise `BackboneError` where a folder's model has no head of one label, or reads more than the two texts."""
    if not has_head(read_config(folder).get("architectures")):
        raise BackboneError(f"{model} is no cross-encoder: it has no classification head; train one with crossenc fit")
    load_config(str(folder))
    if prompt := read_config(folder, "config_sentence_transformers.json").get("default_prompt_name"):
        raise BackboneError(f"{model} puts its prompt {prompt!r} before the texts, which crossenc does not do")


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A model's settings, empty where it has no such file, as a bi-encoder whose layers lie in folders of their own."""
    file = folder / name
    return read_json(file) if file.is_file() else {}


def find(model: str | Path, onnx: bool = False) -> Path:
    """The checkpoint's file or the model's folder; a Hub id is downloaded first, with its ONNX files if asked for."""
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
        raise BackboneError(f"{model} is no folder, no .ckpt file and no Hub id: {one_line(error)}") from error
    except OSError as error:  # of the network and of the Hub
        raise HubError(
            f"model {model} could not be read from the Hugging Face Hub ({one_line(error)}); "
            "give a model that is on this machine: its folder, package:NAME/PATH, or to score by a .ckpt file"
        ) from error


def fingerprint(path: Path) -> str:
    """A short hash of all that decides a model's scores: its weights, config and tokenizer, or the checkpoint."""
    digest = sha256()
    files = [path] if path.is_file() else sorted(f for kind in (*_MODEL_FILES, *_ONNX_FILES) for f in path.rglob(kind))
    for file in filter(Path.is_file, files):
        digest.update(file.name.encode())
        digest.update(file_digest(file).encode())
    return digest.hexdigest()[:16]


def read_threshold(model: str | Path) -> float | None:
    """The score from which on a pair is a duplicate, as a model stored it (its weights are not loaded); else None."""
    path = find(model)
    if path.is_file():
        from .checkpoints import read_checkpoint

        stored = read_checkpoint(path, mmap=True)["crossenc"]
    else:
        stored = read_config(path).get("crossenc") or {}
    threshold: float | None = stored.get("threshold")
    return threshold


def load_checkpoint(path: Path) -> tuple[dict[str, Any], CrossEncoderModule, PreTrainedTokenizerFast]:
    """What a checkpoint holds, its module in evaluation mode, and a tokenizer of its own, on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, or was not written by crossenc; or a subclass of its module
            computes scores in another way.
    """
    from .checkpoints import read_checkpoint
    from .module import CrossEncoderModule

    loaded = read_checkpoint(path)
    settings, forward = loaded["hyper_parameters"], loaded["crossenc"].get("forward")
    if forward:
        raise CheckpointError(f"{path} scores by the forward of a class of its own, {forward}, which no export has")
    # The digest guards the backbone's own weights; these come from the checkpoint.
    module = CrossEncoderModule.load_from_checkpoint(path, map_location="cpu", weights_only=True, backbone_sha256=None)
    tokenizer = load_tokenizer(settings["backbone"], settings["revision"])
    return loaded, module.eval(), copy.deepcopy(tokenizer)
