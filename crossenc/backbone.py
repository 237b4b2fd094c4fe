"""Find and load the backbone: a Hub id, a local folder, or `package:NAME/PATH`, a folder in an installed package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BackboneError, HubError, offline_remedy, one_line
from .parts import file_digest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

DEFAULT_BACKBONE = "distilbert/distilroberta-base"
# No tokenizer means a length like this; transformers writes 1e30 where a tokenizer knows no limit.
_NO_LIMIT = 1_000_000
# Models that number their positions as RoBERTa does, by names that do not tell.
_LIKE_ROBERTA = ("camembert", "longformer", "mpnet", "esm", "data2vec-text", "ibert", "xmod")


def locate(backbone: str | Path) -> str:
    """The Hub id or the folder that a backbone's name stands for.

    Raises:
        BackboneError: a package is not installed, or there is no such folder or no `config.json` in it.
    """
    backbone = str(backbone)
    if backbone.startswith("package:"):
        name, _, path = backbone.removeprefix("package:").partition("/")
        try:
            spec = find_spec(name.replace("-", "_"))
        except (ImportError, ValueError):  # of a name with a dot in it, or of none
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise BackboneError(
                f"{backbone}: no package {name} is installed; try: pip install {name.replace('_', '-')}"
            )
        folder = Path(spec.submodule_search_locations[0]) / path
    elif Path(backbone).exists() or backbone.startswith(("/", "./", "../", "~")) or backbone.count("/") > 1:
        folder = Path(backbone)
    else:
        return backbone
    if folder.is_file():
        raise BackboneError(f"{backbone} is a file, where a model's folder is needed; export makes one of a .ckpt")
    if not folder.is_dir():
        raise BackboneError(f"{backbone}: there is no folder {folder}")
    # A bi-encoder's may be in a folder of its first layer.
    if not any((folder / name).is_file() for name in ("config.json", "modules.json")):
        inner = folder / "model"
        remedy = f"its export is {inner}" if inner.is_dir() else "give a folder or a Hub id that has one"
        raise BackboneError(f"{backbone!r} is no model: the folder has no config.json; {remedy}")
    return str(folder)


def load_config(backbone: str, revision: str | None = None) -> PreTrainedConfig:
    """The backbone's configuration; raises `BackboneError` if its head has another number of labels than one."""
    from transformers import AutoConfig

    with _clear_errors(backbone):
        config = AutoConfig.from_pretrained(locate(backbone), trust_remote_code=False, revision=revision)
    if has_head(config.architectures) and config.num_labels != 1:
        raise BackboneError(
            f"{backbone} is a classifier with {config.num_labels} labels, and a cross-encoder has one; "
            "start from the model that it was made from, or from a head with one label"
        )
    return config  # type: ignore[no-any-return]


def has_head(architectures: list[str] | None) -> bool:
    """Whether a `config.json` names a sequence classifier among its architectures."""
    return any(name.endswith("ForSequenceClassification") for name in architectures or ())


def load_tokenizer(backbone: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The backbone's fast tokenizer; raises `BackboneError` if it has none.

    It is read once, and anew where a folder holds other files by then: another model may have taken its place.
    """
    folder = Path(locate(backbone)).resolve()
    about = ((file, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()) if folder.is_dir() else ()
    return _read_tokenizer(backbone, revision, tuple((str(file), at.st_mtime_ns, at.st_size) for file, at in about))


@cache
def _read_tokenizer(backbone: str, revision: str | None, files: tuple[Any, ...]) -> PreTrainedTokenizerFast:
    """`files` are only there to stand in the cache's key."""
    from transformers import AutoTokenizer

    with _clear_errors(backbone):
        tokenizer = AutoTokenizer.from_pretrained(locate(backbone), trust_remote_code=False, revision=revision)
    if not tokenizer.is_fast:
        raise BackboneError(f"{backbone} has no fast tokenizer (tokenizer.json), which crossenc needs")
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of a folder without it
        raise BackboneError(f"{backbone} has no vocabulary: tokenizer.json is missing")
    if tokenizer.pad_token is None:  # decoder models are trained without padding
        tokenizer.pad_token = tokenizer.eos_token
    config = load_config(backbone, revision)
    if not has_head(config.architectures) and tokenizer.num_special_tokens_to_add(pair=True) == 0:
        tokenizer = _part_texts(tokenizer)
    if "token_type_ids" in tokenizer.model_input_names and not _has_segments(config):
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # or an export would forget it
    return tokenizer  # type: ignore[return-value]


def _part_texts(tokenizer: Any) -> Any:
    """The tokenizer with the token of an end between the texts of a pair. GPT-2 and Qwen put none, and read "a b" and
    "c" as they read "a" and "b c". The export's tokenizer keeps it, for every reader.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    end, rules = tokenizer.eos_token, tokenizer.backend_tokenizer
    if end is None:
        return tokenizer
    ends = [(end, tokenizer.eos_token_id)]
    rules.post_processor = TemplateProcessing(single="$A", pair=f"$A {end} $B", special_tokens=ends)
    names = ("model_max_length", "model_input_names", "padding_side", "truncation_side")
    kept = {name: getattr(tokenizer, name) for name in names} | tokenizer.special_tokens_map
    # Of no class of its own: GPT-NeoX's makes its rules anew whenever it is read.
    return PreTrainedTokenizerFast(tokenizer_object=rules, **kept)  # type: ignore[no-untyped-call]


def _has_segments(config: PreTrainedConfig) -> bool:
    """Whether a backbone takes two segments: not DistilBERT, nor a RoBERTa, which some have with BERT's tokenizer."""
    if (count := getattr(config, "type_vocab_size", None)) is not None:
        return bool(count != 1)
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as MODELS

    model: Any = MODELS.get(type(config), None)  # whose import takes its time
    return not model or "token_type_ids" in signature(model.forward).parameters


def resolve_max_length(backbone: str, max_length: int | None, revision: str | None = None) -> int:
    """The longest pair in tokens, special tokens included: `max_length`, or for None all that the backbone can take.

    RoBERTa-like models number their positions from `pad_token_id + 1`, and so have fewer than their table is long.
    Raises `BackboneError` if `max_length` is more than the backbone can take, or too short for a pair.
    """
    config = load_config(backbone, revision)
    tokenizer = load_tokenizer(backbone, revision)
    positions = getattr(config, "max_position_embeddings", None) or -1
    limit = min(tokenizer.model_max_length, positions if positions > 0 else _NO_LIMIT)  # XLNet's are -1
    if "roberta" in config.model_type or config.model_type in _LIKE_ROBERTA:
        limit = min(limit, config.max_position_embeddings - (config.pad_token_id or 0) - 1)
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if max_length is None and limit >= _NO_LIMIT:
        raise BackboneError(f"{backbone} names no longest input; set --model.max_length")
    if max_length is not None and not special + 2 <= max_length <= limit:
        raise BackboneError(
            f"max_length {max_length} does not fit {backbone}: it takes pairs of {special + 2} to {limit} tokens; "
            "set --model.max_length"
        )
    return max_length or limit


def load_model(
    backbone: str,
    attn_implementation: str | None = None,
    revision: str | None = None,
    sha256: str | None = None,
) -> PreTrainedModel:
    """The backbone with a single-logit head, fp32, in training mode; the head is new unless the weights hold one.

    Weights are read from safetensors only. In training mode, because `from_pretrained` returns evaluation mode and
    Lightning keeps what it gets: the whole run would go without dropout.

    Raises:
        BackboneError: no model, weights missing, a digest other than `sha256`, or a head with other than one label.
        HubError: the Hub is out of reach or has no such model.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    from .attention import use_attention
    from .dropout import use_cheap_dropout

    config = load_config(backbone, revision)
    tokenizer = load_tokenizer(backbone, revision)
    if sha256:
        _check_digest(backbone, sha256)
    config.num_labels = 1
    config.problem_type = None
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    with _clear_errors(backbone), quiet_transformers():
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            locate(backbone),
            config=config,
            dtype=torch.float32,  # transformers 5 keeps the file's type otherwise, and fp16 weights train into NaN
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            revision=revision,
            **({"attn_implementation": attn_implementation} if attn_implementation else {}),
        )
    prefix = model.base_model_prefix + "."
    if wrong := loaded["mismatched_keys"]:
        key, found, wanted = min(wrong, key=lambda item: (not item[0].startswith(prefix), item[0]))
        why = "by its config.json" if key.startswith(prefix) else "with one label, as a cross-encoder has it,"
        raise BackboneError(f"{backbone}: its {key} has the shape {[*found]}, where {why} it would be {[*wanted]}")
    known = getattr(config, "vocab_size", None)
    if known is not None and len(tokenizer) > known:
        raise BackboneError(f"{backbone}: its tokenizer has {len(tokenizer):,} tokens, and its model knows {known:,}")
    # A pooler belongs to the head here: a language model comes without both.
    headed = has_head(config.architectures)
    lost = [key for key in loaded["missing_keys"] if headed or (key.startswith(prefix) and ".pooler." not in key)]
    if lost:
        raise BackboneError(
            f"{backbone} holds no weights for {len(lost)} layers of its own config, such as {min(lost)}"
        )
    if hasattr(model, "score"):  # a decoder's head, which reads the last token that is no padding
        model.config.pad_token_id = tokenizer.pad_token_id
    model.train()
    use_cheap_dropout(model)
    use_attention(model)
    return model  # type: ignore[no-any-return]


def _check_digest(backbone: str, sha256: str) -> None:
    weights = Path(locate(backbone)) / "model.safetensors"
    if not weights.is_file():
        raise BackboneError(f"{backbone}: sha256 is checked for local folders, and {weights} is missing")
    digest = file_digest(weights)
    if digest != sha256:
        raise BackboneError(
            f"{weights} has sha256 {digest}, not {sha256}: these are other weights than those asked for"
        )


@contextmanager
def _clear_errors(backbone: str) -> Iterator[None]:
    """Turn what transformers and the Hub raise for a backbone that cannot be read into one line."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError, StrictDataclassError) as error:
        if isinstance(error, OSError) and not Path(locate(backbone)).is_dir():
            raise HubError(offline_remedy(f"backbone {backbone}", error)) from error
        own_code = "its code comes with it, and crossenc runs none but transformers' own"
        why = own_code if "trust_remote_code" in str(error) else one_line(error)[:300]
        raise BackboneError(f"{backbone} cannot be loaded as a sequence classifier: {why}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' table of new weights and its bar: `load_model` checks the missing weights itself."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
