"""Export a checkpoint to a folder that sentence-transformers, transformers and other readers load.

The folder is written beside its target, loaded again, compared with the checkpoint, and only then renamed.
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torchmetrics.functional.classification import binary_average_precision

from . import figures
from .backbone import quiet_transformers
from .calibration import sigmoid
from .card import write_card
from .checkpoints import owner
from .encode import PairCollator, encode_texts
from .errors import ExportError, HubError, UsageError, one_line
from .loading import load_checkpoint, plain_model
from .onnx_model import write_onnx
from .pairs import read
from .parts import folder_beside, try_writing, writing
from .records import read_figures, read_scores, split_of
from .scorer import Backend, Scoring, score_chunks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from .module import CrossEncoderModule

log = logging.getLogger(__name__)

ACTIVATION = "torch.nn.modules.activation.Sigmoid"
# The first version of sentence-transformers that reads the three files below.
_ST_VERSION = "6.2.0"
TOLERANCE = 1e-5
# onnxruntime fuses operations and orders sums in its own way.
ONNX_TOLERANCE = 1e-4
_PROBES = (
    ("How do I learn to swim?", "What is the best way to learn swimming?"),
    ("How do I learn to swim?", ""),
    ("word " * 500, "another " * 500),
    ("¿Qué es esto? 🙂", "这是什么？ 🙃"),
)


def export(
    checkpoint: str,
    output: str,
    overwrite: bool = False,
    onnx: bool = False,
    int8: bool = False,
    dev: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
) -> Path:
    """Write the export of a checkpoint: weights, tokenizer, the readers' files and a model card.

    Args:
        checkpoint: A `.ckpt` file written by `crossenc fit`.
        output: The folder to write.
        overwrite: Replace an existing export.
        onnx: Add `onnx/model.onnx`, for any batch size and length, in fp32. Needs the extra `onnx`.
        int8: Also add `onnx/model_qint8.onnx`, with 8-bit weights; the card reports what these lose on the dev pairs.
        dev: Labelled pairs for that measurement: a file, or the name of a data set as in fit. Default: the run's own
            dev pairs, if the checkpoint was evaluated on them.
        push_to_hub: Upload the export to this Hub repository, which is created if needed. The token is that of
            `hf auth login` or HF_TOKEN.
        private: Make the repository private.

    Returns:
        The folder.

    Raises:
        CheckpointError: The file is missing or was not written by crossenc.
        DataError, HubError: The dev pairs cannot be read.
        ExportError: The folder exists already, or the export does not score as the checkpoint does.
        HubError: The upload failed; the folder stays.
        UsageError: `int8` without dev pairs; `private` without `push_to_hub`, or for a repository that is public; `dev`
            without `int8`; `push_to_hub` is not the name of a repository.
    """
    if private and push_to_hub is None:
        raise UsageError("--private applies only to an upload; give --push_to_hub REPO too")
    if push_to_hub is not None:
        _require_repository(push_to_hub)
    if dev is not None and not int8:
        raise UsageError("--dev names the pairs that 8-bit weights are measured on; give --int8 too")
    target = Path(output)
    if target.exists():
        if not overwrite:
            raise ExportError(f"{target} already exists; choose another folder, or give --overwrite")
        if not (target / "modules.json").is_file():
            raise ExportError(f"{target} exists and is not an export, so it is not overwritten; choose another folder")
    try_writing(target)
    loaded, module, tokenizer = load_checkpoint(Path(checkpoint))
    measured, evaluated, sources = _evaluated(loaded, Path(checkpoint))
    pairs = _dev_pairs(evaluated.get("val"), Path(checkpoint), dev) if int8 else None
    with folder_beside(target) as space:
        unfinished = space / "new"
        expected = _module_scores(module, tokenizer, _PROBES)
        with writing(target):
            _write(unfinished, module, tokenizer)
        _compare(f"the export of {checkpoint}", expected, score_pairs(unfinished, _PROBES), TOLERANCE)
        # A folder named `model` is in a run's folder, whose name says more.
        name = push_to_hub or (target.resolve().parent.name if target.name == "model" else target.name)
        added = _add_onnx(unfinished, expected, pairs) if onnx or int8 else None
        with writing(target):
            pictures = figures.draw(evaluated, module.threshold)
            if learning := figures.draw_learning(Path(checkpoint).parent):
                pictures["learning"] = learning
            figures.save(pictures, unfinished / "figures")
            write_card(unfinished, name, loaded, measured, module.max_length, sources, evaluated.get("val"), added)
            # If another export removed the folder, plots and card have made it anew, without this file.
            if not (unfinished / "modules.json").is_file():
                raise ExportError(f"another export to {target} has begun in the meantime, so this one was dropped")
            if target.exists():
                target.rename(space / "old")
            unfinished.rename(target)
    if push_to_hub is not None:
        log.info("uploaded: %s", upload(target, push_to_hub, private))
    return target


def _require_repository(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"--push_to_hub {name}: {one_line(error)}") from error
    if "/" not in name:  # the card says how to load the model from there
        raise UsageError(f"--push_to_hub {name}: name the owner too, as in owner/{name}")


def upload(folder: Path, repository: str, private: bool = False) -> str:
    """Upload an export to the Hub; returns the repository's address.

    Raises:
        HubError: the upload failed; the message says how to repeat it.
        UsageError: it should be private, but the repository exists already and is public.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repository, private=private or None, exist_ok=True)
        exposed = private and not api.repo_info(address.repo_id).private
        if not exposed:
            api.upload_folder(
                folder_path=folder,
                repo_id=address.repo_id,
                commit_message="Upload by crossenc",
                delete_patterns=["onnx/*", "figures/*"],  # an earlier model may have had more of them
            )
    except Exception as error:  # the HTTP library's own too, and which library it is depends on the client's version
        command = ["hf", "upload", repository, str(folder), *["--private"] * private]
        raise HubError(
            f"{folder} is written, but its upload to {repository} failed ({one_line(error)}); log in with "
            f"`hf auth login` or set HF_TOKEN, and repeat it with: {shlex.join(command)}"
        ) from error
    if exposed:
        raise UsageError(f"{folder} is written, but not uploaded: {repository} exists and is public; make it private")
    return str(address)


def _compare(what: str, expected: Sequence[float], found: Sequence[float], tolerance: float) -> None:
    """Raise `ExportError` if scores differ by more than `tolerance`, or one of them is NaN."""
    worst = np.abs(np.subtract(expected, found)).max()  # Python's max could miss a NaN
    if not worst <= tolerance:
        raise ExportError(f"{what} gives scores that differ by {worst:.2g} from the checkpoint's")


def _add_onnx(folder: Path, expected: list[float], dev: Mapping[str, Any] | None) -> dict[str, float]:
    """Write the ONNX files, compare them with the checkpoint, and return what the card says about them."""

    def score(backend: Backend, pairs: Sequence[tuple[str, str]]) -> Any:
        ((_, logits),) = score_chunks(Scoring(str(folder), backend=backend), [(0, list(pairs))])
        return sigmoid(logits)

    write_onnx(folder, int8=dev is not None)
    _compare(f"{folder.name}/onnx/model.onnx", expected, score("onnx", _PROBES), ONNX_TOLERANCE)
    if dev is None:
        return {}
    pairs, truth = list(zip(dev["text_a"], dev["text_b"], strict=True)), (torch.tensor(dev["label"]) >= 0.5).long()
    exact, rounded = score("onnx", pairs), score("onnx-int8", pairs)
    before, after = (binary_average_precision(torch.from_numpy(scores), truth).item() for scores in (exact, rounded))
    difference = float(abs(exact - rounded).max())
    message = "average precision on %s dev pairs: %.4f, with 8-bit weights %.4f; scores differ by up to %.3f"
    log.info(message, f"{len(pairs):,}", before, after, difference)
    return {"rows": len(pairs), "onnx": before, "onnx-int8": after, "difference": difference}


def _evaluated(loaded: dict[str, Any], checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Figures, scores and sources of a checkpoint, without those of a `validate` on other dev pairs than its run's."""
    location = (checkpoint.parent, owner(checkpoint))
    (known, sources), evaluated = read_figures(*location), read_scores(*location)
    data = loaded.get("PairDataModule") or {}
    dev, rows = data.get("sources", {}).get("val"), data.get("rows", {}).get("val")
    if "val" in sources and (Path(sources["val"]) != Path(dev or "") or known.get("val/rows") != rows):
        known = {name: value for name, value in known.items() if split_of(name) != "val"}
        del sources["val"]
        evaluated.pop("val", None)
    return loaded["crossenc"]["figures"] | known, evaluated, sources


def _dev_pairs(own: Mapping[str, Any] | None, checkpoint: Path, dev: str | None) -> Mapping[str, Any]:
    """The columns of labelled pairs: of `dev`, or of the run's dev pairs, if the checkpoint was evaluated on them."""
    pairs = own if dev is None else read(dev)[:]
    if pairs is None:
        raise UsageError(
            f"--int8 is measured on dev pairs, but {checkpoint} was not evaluated on those of its run; "
            f"give --dev FILE, or evaluate it with: crossenc validate --config {checkpoint.parent / 'config.yaml'} "
            f"--ckpt_path {checkpoint}"
        )
    if len({label >= 0.5 for label in pairs["label"]}) < 2:
        raise ExportError("the cost of 8-bit weights cannot be measured: all dev labels are the same; give --dev FILE")
    return pairs


def score_pairs(folder: str | Path, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Scores (after the sigmoid, in fp32) that an export gives to a few pairs of texts, on the CPU."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    inputs = tokenizer([list(pair) for pair in pairs], padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        scores: list[float] = model.eval()(**inputs).logits[:, 0].sigmoid().tolist()
    return scores


def _module_scores(
    module: CrossEncoderModule, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]
) -> list[float]:
    """The module's own scores, computed as in training: token ids, collator, forward."""
    table = encode_texts(pairs, tokenizer, module.max_length)
    with torch.inference_mode():
        found = module.predict_step(PairCollator(tokenizer)(table), 0)
    scores: list[float] = found["score"][found["row"].argsort()].tolist()
    return scores


def _write(folder: Path, module: CrossEncoderModule, tokenizer: PreTrainedTokenizerFast) -> None:
    model = plain_model(module)
    # vLLM and older sentence-transformers read the activation from config.json.
    model.config.sentence_transformers = {"activation_fn": ACTIVATION, "version": _ST_VERSION}
    if module.threshold is not None:
        model.config.crossenc = {"threshold": module.threshold}
    elif hasattr(model.config, "crossenc"):  # if the backbone was an export itself
        del model.config.crossenc
    with quiet_transformers():
        model.save_pretrained(folder)
    # Give the weights the other files' permissions; safetensors makes them readable for their owner only.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    # Readers truncate at this length; without it, RoBERTa's positions overflow.
    tokenizer.model_max_length = module.max_length
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    # The one name of the general class that transformers 4 knows too.
    settings = folder / "tokenizer_config.json"
    named = settings.read_text(encoding="utf-8").replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
    settings.write_text(named, encoding="utf-8")
    # sentence-transformers needs all three files: if one is missing, it drops the classifier.
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
        ],
        "config_sentence_transformers.json": {
            "__version__": {
                "sentence_transformers": _ST_VERSION,
                "transformers": version("transformers"),
                "pytorch": version("torch"),
            },
            "activation_fn": ACTIVATION,
            "default_prompt_name": None,
            "model_type": "CrossEncoder",
            "prompts": {},
        },
        "sentence_bert_config.json": {
            "transformer_task": "sequence-classification",
            "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
            "module_output_name": "scores",
            "max_seq_length": module.max_length,  # text-embeddings-inference does not start without it
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
