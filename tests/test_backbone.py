"""Finding and loading backbones."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from crossenc.backbone import load_config, load_model, load_tokenizer, locate, resolve_max_length
from crossenc.errors import BackboneError
from crossenc.forward import pair_logits

from .conftest import BACKBONE, collate, edit_json


def test_lengths_fit_the_backbone():
    assert resolve_max_length(BACKBONE, None) == 512
    assert resolve_max_length(BACKBONE, 5) == 5
    for wrong in (4, 513):
        with pytest.raises(BackboneError, match="5 to 512 tokens"):
            resolve_max_length(BACKBONE, wrong)
    assert load_config(BACKBONE).model_type == "bert"
    assert locate("owner/name") == "owner/name"
    assert locate(BACKBONE.replace("_", "-")) == locate(BACKBONE)


def test_a_backbone_becomes_one_fp32_logit_in_training_mode():
    model = load_model(BACKBONE)
    assert model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (model.config.num_labels, model.classifier.out_features, model.config.problem_type) == (1, 1, None)
    assert load_model(BACKBONE, "eager").config._attn_implementation == "eager"


def test_weights_in_half_precision_become_fp32(tiny: Path, tmp_path: Path):
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_pretrained(tiny, dtype=torch.float16).save_pretrained(tmp_path)
    load_tokenizer(str(tiny)).save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in load_model(str(tmp_path)).parameters()} == {torch.float32}


def test_a_tokenizer_is_read_once_and_anew_where_another_took_its_place(tiny: Path, tmp_path: Path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    rules = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(rules))  # as large as the other one
    first = load_tokenizer(str(folder))
    assert load_tokenizer(str(folder)) is first
    words = rules["model"]["vocab"]
    words["one"], words["two"] = words["two"], words["one"]
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    assert load_tokenizer(str(folder))("one").input_ids == first("two").input_ids


def test_the_lower_limit_counts_and_there_must_be_one(tmp_path: Path):
    load_tokenizer(BACKBONE).save_pretrained(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", model_max_length=32)
    transformers.BertConfig().save_pretrained(tmp_path)
    assert resolve_max_length(str(tmp_path), None) == 32
    edit_json(tmp_path / "tokenizer_config.json", model_max_length=None)
    assert resolve_max_length(str(tmp_path), None) == 512
    transformers.XLNetConfig().save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="has no maximum length of its own"):
        resolve_max_length(str(tmp_path), None)
    assert resolve_max_length(str(tmp_path), 600) == 600


@pytest.mark.parametrize("kind", ["Roberta", "MPNet", "Data2VecText", "IBert", "Xmod"])
def test_roberta_positions_begin_after_the_padding(kind: str, tmp_path: Path):
    """The table holds 514 rows and a text of 512 tokens uses the last: sentence-transformers' #3302."""
    import transformers

    load_tokenizer(BACKBONE).save_pretrained(tmp_path)
    config = getattr(transformers, f"{kind}Config")
    config(max_position_embeddings=66, pad_token_id=1).save_pretrained(tmp_path)
    assert resolve_max_length(str(tmp_path), None) == 64
    config(max_position_embeddings=66, pad_token_id=0).save_pretrained(tmp_path)
    assert resolve_max_length(str(tmp_path), None) == 65


def test_segments_are_given_to_those_that_take_them(tmp_path: Path):
    from transformers import AutoTokenizer, DistilBertConfig, RobertaConfig

    for name, config in {"distilbert": DistilBertConfig(), "roberta": RobertaConfig(type_vocab_size=1)}.items():
        load_tokenizer(BACKBONE).save_pretrained(tmp_path / name)  # a BERT's, which knows segments
        config.save_pretrained(tmp_path / name)
        assert "token_type_ids" not in load_tokenizer(str(tmp_path / name)).model_input_names
        load_tokenizer(str(tmp_path / name)).save_pretrained(tmp_path / "export")
        assert "token_type_ids" not in AutoTokenizer.from_pretrained(tmp_path / "export").model_input_names
    assert "token_type_ids" in load_tokenizer(BACKBONE).model_input_names


def test_a_decoder_reads_past_the_padding_that_it_gets(tmp_path: Path):
    """Though its config says that it is padded with another token than its tokenizer's."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    tokenizer = load_tokenizer(BACKBONE)
    tokenizer.save_pretrained(tmp_path)
    config = LlamaConfig(**sizes, vocab_size=len(tokenizer), num_labels=1, pad_token_id=5)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path)).eval()
    batch = collate([("a", "b"), ("a much longer text", "and another")], str(tmp_path), piece_cost=100)  # padded
    alone = collate([("a", "b")], str(tmp_path))
    with torch.inference_mode():
        found, expected = pair_logits(model, batch)[batch["row"].argmin()], pair_logits(model, alone)[0]
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("kind", ["GPT2", "Qwen2", "GPTNeoX"])
def test_a_decoder_that_marks_no_end_gets_one_between_the_texts(kind: str, tmp_path: Path):
    """GPT-NeoX's tokenizer makes its rules anew when it is read."""
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = {token: number for number, token in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())])}
    make, config = getattr(transformers, f"{kind}Tokenizer"), getattr(transformers, f"{kind}Config")
    rest = {"model_max_length": 32, "truncation_side": "left", "padding_side": "left"}
    plain = make(vocab=vocabulary, merges=[], eos_token="<|endoftext|>", pad_token=None, **rest)
    end, (a, space, b), (c,) = 0, plain("a b").input_ids, plain("c").input_ids
    assert plain("a b", " c").input_ids == plain("a", " b c").input_ids
    for name, architecture in {"new": f"{kind}Model", "trained": f"{kind}ForSequenceClassification"}.items():
        plain.save_pretrained(tmp_path / name)
        config(architectures=[architecture], num_labels=1).save_pretrained(tmp_path / name)
    tokenizer = load_tokenizer(str(tmp_path / "new"))
    assert tokenizer("a b", "c").input_ids == [a, space, b, end, c]
    assert {name: getattr(tokenizer, name) for name in rest} == rest
    assert tokenizer.pad_token == "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path / "export")
    config().save_pretrained(tmp_path / "export")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "export")("a", "c").input_ids == [a, end, c]
    trained = load_tokenizer(str(tmp_path / "trained"))  # without: as it learnt
    assert trained("a b", "c").input_ids == [a, space, b, c]


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path):
    load_tokenizer(BACKBONE).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", model_type="own", auto_map={"AutoConfig": "own.Config"})
    with pytest.raises(BackboneError, match="it comes with its own code"):
        load_tokenizer(str(tmp_path))


def test_weights_are_safetensors_and_complete(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(locate(BACKBONE), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in weights.items() if "layer.5" not in name}, folder / "model.safetensors")
    with pytest.raises(BackboneError, match=r"lacks 16 of the weights of its own config, such as bert\.encoder"):
        load_model(str(folder))
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")  # a pickle, which could run code
    with pytest.raises(BackboneError, match="cannot be loaded"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"max_position_embeddings": 500}, r"position_embeddings.weight has the shape \[512, 16\], but its config.j"),
        ({"hidden_size": "big"}, "cannot be loaded as a sequence classifier: .*hidden_size"),
    ],
)
def test_files_that_do_not_fit_together_are_named(tiny: Path, tmp_path: Path, wrong: dict, said: str):
    folder = shutil.copytree(tiny, tmp_path / "model")
    edit_json(folder / "config.json", **wrong)
    with pytest.raises(BackboneError, match=said):
        load_model(str(folder))


def test_a_head_for_another_task_is_named_and_a_language_model_needs_no_pooler(tmp_path: Path):
    from transformers import BertConfig, BertForMaskedLM, BertForTokenClassification

    load_tokenizer(BACKBONE).save_pretrained(tmp_path)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(**small)).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).bert.pooler is not None
    BertForTokenClassification(BertConfig(num_labels=9, **small)).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=r"its classifier.* \[9.*\], but the one label .* requires \[1"):
        load_model(str(tmp_path))


def test_a_tokenizer_of_another_model_is_named(tiny: Path, tmp_path: Path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    tokenizer = copy.deepcopy(load_tokenizer(str(tiny)))  # which others share
    tokenizer.add_tokens(["newword"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(BackboneError, match="its tokenizer has 30,523 tokens, but its model knows 30,522"):
        load_model(str(folder))


def test_a_head_that_a_config_names_is_not_made_anew(tiny: Path, tmp_path: Path):
    """Its scores would be others on each call."""
    from safetensors.torch import load_file, save_file

    for left_out in ("classifier.weight", "bert.pooler.dense.bias"):
        folder = shutil.copytree(tiny, tmp_path / left_out)
        weights = load_file(folder / "model.safetensors")
        del weights[left_out]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(BackboneError, match=f"lacks 1 of the weights .* such as {left_out}"):
            load_model(str(folder))


@pytest.mark.parametrize("name", ["runs/gone/model", "../gone", "~/gone"])
def test_a_folder_that_is_not_there_is_no_hub_id(name: str):
    with pytest.raises(BackboneError, match="there is no folder"):
        locate(name)


@pytest.mark.parametrize("name", ["a.b/model", ".x", "", "gone/model", "csv/model"])
def test_a_package_that_is_not_there_is_named(name: str):
    with pytest.raises(BackboneError, match=r"package .*is not installed"):
        locate(f"package:{name}")


def test_a_trained_head_is_kept_and_its_kind_of_loss_is_not(tiny: Path, tmp_path: Path):
    """By which the pipeline of transformers would leave out the sigmoid."""
    from safetensors.torch import load_file

    folder = shutil.copytree(tiny, tmp_path / "model")
    edit_json(folder / "config.json", problem_type="regression")
    model = load_model(str(folder))
    assert torch.equal(model.classifier.weight, load_file(tiny / "model.safetensors")["classifier.weight"])
    assert model.config.problem_type is None


def test_a_revision_is_that_of_config_tokenizer_and_weights(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    asked, kinds = [], ("Config", "Tokenizer", "ModelForSequenceClassification")
    for kind in kinds:
        plain = getattr(transformers, f"Auto{kind}").from_pretrained
        note = lambda *given, kind=kind, plain=plain, **more: (  # noqa: E731
            asked.append((kind, more.get("revision"))) or plain(*given, **more)
        )
        monkeypatch.setattr(f"transformers.Auto{kind}.from_pretrained", note)
    load_model(str(tiny), revision="first")
    assert {*asked} == {(kind, "first") for kind in kinds}


def test_a_tokenizer_without_a_fast_form_is_named(tmp_path: Path):
    transformers.CanineTokenizer().save_pretrained(tmp_path)
    transformers.CanineConfig().save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="has no fast tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_kind_of_model_that_classifies_nothing_is_named(tmp_path: Path):
    load_tokenizer(BACKBONE).save_pretrained(tmp_path)
    transformers.CodeGenConfig().save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="cannot be loaded as a sequence classifier"):
        load_model(str(tmp_path))


def test_a_tokenizer_without_an_end_stays_as_it_is(tmp_path: Path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    plain.save_pretrained(tmp_path)
    transformers.BertConfig().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))("a", "b").input_ids == [2, 3]
