"""Batches in fixed shapes, and the CUDA graphs made of them: the same logits and gradients."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crossenc import CrossEncoderModule
from crossenc.backbone import load_model, locate
from crossenc.errors import UsageError
from crossenc.forward import pair_logits
from crossenc.graphs import Filled, GraphedModel, fill, fixed_shape

from .conftest import BACKBONE, collate
from .test_forward import PAIRS, gradients


@given(st.lists(st.integers(1, 512), min_size=1, max_size=700))
def test_a_fixed_shape_has_room_for_short_fillers_and_there_are_few(lengths: list[int]):
    pairs, tokens, longest = fixed_shape(len(lengths), sum(lengths), max(lengths))
    fillers, room = pairs - len(lengths), tokens - sum(lengths)
    assert 1 <= -(-room // fillers) <= 33 < longest
    assert fillers <= room
    assert max(lengths) <= longest <= max(128, 2 * max(lengths))
    assert room <= max(256, sum(lengths) / 8) + fillers


def test_steps_of_as_many_pairs_come_in_few_shapes():
    lengths = torch.randint(5, 60, (2000, 64), generator=torch.Generator().manual_seed(0))
    assert len({fixed_shape(64, sum(step), max(step)) for step in lengths.tolist()}) <= 5


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")  # the CPU's kernel only
def test_fillers_change_neither_logits_nor_gradients():
    model = load_model(BACKBONE).eval()
    batch = collate(PAIRS, BACKBONE)
    shape = fixed_shape(len(PAIRS), len(batch["input_ids"]), 128)
    filled = fill(batch, shape)
    assert [len(part) for part in filled] == [shape[1], shape[1], shape[0], shape[1]]
    fillers = filled[2].diff(append=torch.tensor([shape[1]]))[len(PAIRS) :]
    assert 1 <= fillers.min() <= fillers.max() <= 33
    expected, found = pair_logits(model, batch), Filled(model, shape)(*filled)[: len(PAIRS), 0]
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(gradients(model, found), gradients(model, expected), atol=1e-5)


def test_graphs_and_what_they_do_not_go_with():
    with pytest.raises(UsageError, match=r"model\.cuda_graphs"):
        CrossEncoderModule(BACKBONE, cuda_graphs=True, gradient_checkpointing=True)
    with pytest.raises(UsageError, match=r"model\.cuda_graphs"):
        CrossEncoderModule(BACKBONE, cuda_graphs=True, attn_implementation="eager")
    module = CrossEncoderModule(BACKBONE, cuda_graphs=True)
    assert module.graphed is None  # until a run on a GPU
    module.trainer = SimpleNamespace(accumulate_grad_batches=2)
    with pytest.raises(UsageError, match=r"model\.cuda_graphs cannot be combined with accumulate_grad_batches"):
        module.on_fit_start()


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification

    folder = tmp_path_factory.mktemp("roberta")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 80}
    config = RobertaConfig(vocab_size=30522, num_labels=1, pad_token_id=0, initializer_range=0.1, **sizes)
    RobertaForSequenceClassification(config).save_pretrained(folder)
    names = ["input_ids", "attention_mask"]
    tokenizer = AutoTokenizer.from_pretrained(locate(BACKBONE), model_input_names=names)
    tokenizer.save_pretrained(folder)
    return str(folder)


def on_gpu(batch):
    return {name: part.cuda() if isinstance(part, torch.Tensor) else part for name, part in batch.items()}


@cuda
def test_a_gpu_gives_the_cpus_logits_and_gradients_with_graphs_and_without(roberta: str):
    model = load_model(roberta).eval()
    batch = collate(PAIRS, roberta)
    expected = pair_logits(model, batch)
    wanted = gradients(model, expected)
    model.cuda()
    for kind, tolerance in ((torch.float32, 2e-4), (torch.bfloat16, 0.1)):
        graphed = GraphedModel(model, torch.device("cuda:0"))
        with torch.autocast("cuda", torch.bfloat16, enabled=kind == torch.bfloat16):
            plain = pair_logits(model, on_gpu(batch))
            by_graph = [graphed(on_gpu(collate(PAIRS[n:], roberta)))[:, 0] for n in (0, 5)]  # two shapes
            by_graph[0] = graphed(on_gpu(batch))[:, 0]
            with torch.inference_mode():
                assert torch.allclose(pair_logits(model, on_gpu(batch)), plain, atol=tolerance)
        assert torch.allclose(plain.cpu(), expected, atol=tolerance)
        assert torch.allclose(by_graph[0].float().cpu(), expected, atol=tolerance)
        for logits in (by_graph[0].float(), plain):
            found = gradients(model, logits).cpu()
            assert (found - wanted).norm() < (1e-3 if kind == torch.float32 else 5e-2) * wanted.norm()


@cuda
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_training_with_graphs_goes_the_same_way(roberta: str, tmp_path: Path, precision: str):
    from lightning.pytorch import Trainer, seed_everything

    from crossenc import PairDataModule

    losses = {}
    for graphs in (False, True):
        seed_everything(1)
        module = CrossEncoderModule(roberta, cuda_graphs=graphs, dropout=0.0, learning_rate=1e-3)
        data = PairDataModule("sample", backbone=roberta, batch_size=16)
        trainer = Trainer(
            max_steps=60, precision=precision, accelerator="gpu", devices=1, gradient_clip_val=1.0,
            default_root_dir=tmp_path, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        )  # fmt: skip
        trainer.fit(module, data)
        losses[graphs] = trainer.validate(module, data, verbose=False)[0]["val/loss"]
        assert module.graphed is None
    assert losses[True] == pytest.approx(losses[False], rel=1e-3 if precision == "32-true" else 3e-2)
