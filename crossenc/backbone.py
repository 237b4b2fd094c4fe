"""Find and load the backbone: a Hub id, a local folder, or `package:NAME/PATH` for a folder in an installed package."""

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
# A length from here on means that there is no limit: transformers sets 1e30 for a tokenizer without one.
_NO_LIMIT = 1_000_000
# Models that number their positions as RoBERTa does, but do not have "roberta" in their name.
_LIKE_ROBERTA = ("camembert", "longformer", "mpnet", "esm", "data2vec-text", "ibert", "xmod")


def locate(backbone: str | Path) -> str:
    """The Hub id or the folder that a backbone's name stands for.

    Raises:
        BackboneError: The package is not installed, the folder does not exist, or it has no `config.json`.
    """
    backbone = str(backbone)
    if backbone.startswith("package:"):
        name, _, path = backbone.removeprefix("package:").partition("/")
        try:
            spec = find_spec(name.replace("-", "_"))
        except (ImportError, ValueError):  # for a name with a dot, or an empty one
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise BackboneError(
                f"{backbone}: package {name} is not installed; try: pip install {name.replace('_', '-')}"
            )
        folder = Path(spec.submodule_search_locations[0]) / path
    elif Path(backbone).exists() or backbone.startswith(("/", "./", "../", "~")) or backbone.count("/") > 1:
        folder = Path(backbone)
    else:
        return backbone
    if folder.is_file():
        raise BackboneError(f"{backbone} is a file, not a model's folder; export makes such a folder from a .ckpt file")
    if not folder.is_dir():
        raise BackboneError(f"{backbone}: there is no folder {folder}")
    if (folder / "adapter_config.json").is_file():
        raise BackboneError(
            f"{backbone} is an adapter; merge it into its model (peft: merge_and_unload), and save that"
        )
    # A bi-encoder has a modules.json, and may keep its config.json in the subfolder of its first layer.
    if not any((folder / name).is_file() for name in ("config.json", "modules.json")):
        inner = folder / "model"
        remedy = f"its export is {inner}" if inner.is_dir() else "give a folder or a Hub id that has one"
        raise BackboneError(f"{backbone!r} is not a model: the folder has no config.json; {remedy}")
    return str(folder)


def load_config(backbone: str, revision: str | None = None) -> PreTrainedConfig:
    """The backbone's configuration; raises `BackboneError` if it is a classifier with more or fewer labels than one."""
    from transformers import AutoConfig

    with _one_line_errors(backbone):
        config = AutoConfig.from_pretrained(locate(backbone), trust_remote_code=False, revision=revision)
    if has_head(config.architectures) and config.num_labels != 1:
        raise BackboneError(
            f"{backbone} is a classifier with {config.num_labels} labels, but a cross-encoder has one; "
            "start from the model that it was fine-tuned from, or from a classifier with one label"
        )
    return config  # type: ignore[no-any-return]


def has_head(architectures: list[str] | None) -> bool:
    """Whether the architectures in a `config.json` include a sequence classifier."""
    return any(name.endswith("ForSequenceClassification") for name in architectures or ())


def load_tokenizer(backbone: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The backbone's fast tokenizer; raises `BackboneError` if it has none.

    It is cached, and read again if the files in its folder have changed: another model may have taken their place.
    """
    folder = Path(locate(backbone))
    stats = ((file, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()) if folder.is_dir() else ()
    return _read_tokenizer(backbone, revision, tuple((str(file), at.st_mtime_ns, at.st_size) for file, at in stats))


@cache
def _read_tokenizer(backbone: str, revision: str | None, files: tuple[Any, ...]) -> PreTrainedTokenizerFast:
    """`files` is only part of the cache key."""
    from transformers import AutoTokenizer

    with _one_line_errors(backbone):
        tokenizer = AutoTokenizer.from_pretrained(locate(backbone), trust_remote_code=False, revision=revision)
    if not tokenizer.is_fast:
        raise BackboneError(f"{backbone} has no fast tokenizer (tokenizer.json), which crossenc needs")
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers builds from a folder without the file
        raise BackboneError(f"{backbone} has no vocabulary: tokenizer.json is missing")
    if tokenizer.pad_token is None:  # decoder models are trained without padding
        tokenizer.pad_token = tokenizer.eos_token
    config = load_config(backbone, revision)
    if not has_head(config.architectures) and tokenizer.num_special_tokens_to_add(pair=True) == 0:
        tokenizer = _separate_texts(tokenizer)
    if "token_type_ids" in tokenizer.model_input_names and not _has_segments(config):
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    # Else save_pretrained would lose them, and which ones are the default depends on transformers' version.
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names
    return tokenizer  # type: ignore[return-value]


def _separate_texts(tokenizer: Any) -> Any:
    """The tokenizer with the end token between the two texts of a pair. Those of GPT-2 and Qwen put nothing there, so
    that ("a b", "c") and ("a", "b c") become the same tokens. The export keeps this tokenizer, so every reader uses it.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    end, backend = tokenizer.eos_token, tokenizer.backend_tokenizer
    if end is None:
        return tokenizer
    special_tokens = [(end, tokenizer.eos_token_id)]
    backend.post_processor = TemplateProcessing(single="$A", pair=f"$A {end} $B", special_tokens=special_tokens)
    names = ("model_max_length", "model_input_names", "padding_side", "truncation_side")
    settings = {name: getattr(tokenizer, name) for name in names} | tokenizer.special_tokens_map
    # Not of the tokenizer's own class: GPT-NeoX's builds a new post-processor whenever it is loaded.
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)  # type: ignore[no-untyped-call]


def _has_segments(config: PreTrainedConfig) -> bool:
    """Whether a backbone takes segment ids. DistilBERT and RoBERTa do not, though some come with BERT's tokenizer."""
    if (count := getattr(config, "type_vocab_size", None)) is not None:
        return bool(count != 1)
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as MODELS

    model: Any = MODELS.get(type(config), None)  # imports the model's code, which takes time
    return not model or "token_type_ids" in signature(model.forward).parameters


def resolve_max_length(backbone: str, max_length: int | None, revision: str | None = None) -> int:
    """The longest pair in tokens, including special tokens: `max_length`, or for None the backbone's own limit.

    RoBERTa-like models number their positions from `pad_token_id + 1`, so they have fewer than their table has rows.

    Raises:
        BackboneError: `max_length` is above the backbone's limit or too short for a pair, or it is None and there is
            no limit.
    """
    config = load_config(backbone, revision)
    tokenizer = load_tokenizer(backbone, revision)
    positions = getattr(config, "max_position_embeddings", None) or -1
    limit = min(tokenizer.model_max_length, positions if positions > 0 else _NO_LIMIT)  # XLNet has -1
    if "roberta" in config.model_type or config.model_type in _LIKE_ROBERTA:
        limit = min(limit, config.max_position_embeddings - (config.pad_token_id or 0) - 1)
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if max_length is None and limit >= _NO_LIMIT:
        raise BackboneError(f"{backbone} has no maximum length of its own; set --model.max_length")
    if max_length is not None and not special + 2 <= max_length <= limit:
        raise BackboneError(
            f"max_length {max_length} does not fit {backbone}: it takes pairs of {special + 2} to {limit} tokens; "
            "set --model.max_length"
        )
    if max_length is None and not (limit == int(limit) >= special):
        raise BackboneError(
            f"{backbone}: its longest pair by its tokenizer and config, {limit} tokens, must be a whole number of at "
            f"least {special}; correct model_max_length in tokenizer_config.json"
        )
    return max_length or int(limit)


def load_model(
    backbone: str,
    attn_implementation: str | None = None,
    revision: str | None = None,
    sha256: str | None = None,
) -> PreTrainedModel:
    """The backbone with a single-logit head, in fp32 and training mode; the head is new unless the weights contain one.

    Weights are read from safetensors only. Training mode is set here because `from_pretrained` returns evaluation mode
    and Lightning keeps the mode that it gets: the whole run would have no dropout.

    Raises:
        BackboneError: There is no such model, its weights are incomplete or do not have the digest `sha256`, or its
            head has more or fewer labels than one.
        HubError: The Hub is out of reach or has no such model.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    from .attention import use_attention
    from .dropout import use_cheap_dropout
    from .embedding import use_reusing_embedding

    config = load_config(backbone, revision)
    tokenizer = load_tokenizer(backbone, revision)
    if sha256:
        _check_digest(backbone, sha256)
    config.num_labels = 1
    config.problem_type = None
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    with _one_line_errors(backbone), quiet_transformers():
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            locate(backbone),
            config=config,
            dtype=torch.float32,  # otherwise transformers 5 keeps the file's type, and fp16 weights train into NaN
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            revision=revision,
            **({"attn_implementation": attn_implementation} if attn_implementation else {}),
        )
    prefix = model.base_model_prefix + "."
    if mismatched := loaded["mismatched_keys"]:
        key, found, expected = min(mismatched, key=lambda item: (not item[0].startswith(prefix), item[0]))
        reason = "its config.json" if key.startswith(prefix) else "the one label of a cross-encoder"
        raise BackboneError(f"{backbone}: its {key} has the shape {[*found]}, but {reason} requires {[*expected]}")
    known = getattr(config, "vocab_size", None)
    if known is not None and len(tokenizer) > known:
        raise BackboneError(f"{backbone}: its tokenizer has {len(tokenizer):,} tokens, but its model knows {known:,}")
    # The pooler counts as a part of the head here: a language model comes without either.
    headed = has_head(config.architectures)
    missing = [key for key in loaded["missing_keys"] if headed or (key.startswith(prefix) and ".pooler." not in key)]
    if missing:
        raise BackboneError(f"{backbone} lacks {len(missing)} of the weights of its own config, such as {min(missing)}")
    if hasattr(model, "score"):  # a decoder's head, which reads the last token that is not padding
        model.config.pad_token_id = tokenizer.pad_token_id
    model.train()
    use_cheap_dropout(model)
    use_reusing_embedding(model)
    use_attention(model)
    return model  # type: ignore[no-any-return]


def _check_digest(backbone: str, sha256: str) -> None:
    weights = Path(locate(backbone)) / "model.safetensors"
    if not weights.is_file():
        raise BackboneError(f"{backbone}: a sha256 is checked in local folders only, and {weights} is missing")
    digest = file_digest(weights)
    if digest != sha256:
        raise BackboneError(f"{weights} has sha256 {digest}, not {sha256}: these are not the requested weights")


@contextmanager
def _one_line_errors(backbone: str) -> Iterator[None]:
    """Turn what transformers and the Hub raise for a backbone that cannot be loaded into an error of one line."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError, StrictDataclassError) as error:
        if isinstance(error, OSError) and not Path(locate(backbone)).is_dir():
            raise HubError(offline_remedy(f"backbone {backbone}", error)) from error
        own_code = "it comes with its own code, and crossenc runs only that of transformers"
        reason = own_code if "trust_remote_code" in str(error) else one_line(error)[:300]
        raise BackboneError(f"{backbone} cannot be loaded as a sequence classifier: {reason}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' report of new weights and its progress bar: `load_model` checks missing weights itself."""
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
