"""Training speed beside sentence-transformers' trainer: same pairs, model, seed, precision; in interleaved rounds.

    python benchmarks/train.py --pairs 1280 --skip 4                 # on the CPU, offline backbone
    python benchmarks/train.py --device cuda --shape distilroberta --pairs 12800 --skip 100 --precision bf16-mixed

Each round trains every contender for one epoch on the first pairs of train.tsv, batch 64. The clock runs from the first
step, or the one after `--skip` (the first ones warm up, and make graphs on a GPU), to the end of the last. Ours reads
tokens from its cache, as each epoch and each later run does; the peer tokenizes in every step. MFU is 6 x layer
parameters x real tokens over the best matrix product of the same machine in the same precision. Needs the extras
`offline` and `peer`.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import BACKBONE, begin, best_matrix_product, make_parser, quiet, spread, take_rows, write_record

DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, window 5": {"window": 5},
    "ours, by tokens, window 50": {"batch_by": "tokens", "window": 50},
}
OURS_ON_GPU: dict[str, dict[str, Any]] = {"ours": {}, "ours, without CUDA graphs": {"cuda_graphs": False}}


def make_backbone(shape: str, folder: Path) -> str:
    """The offline backbone, or random weights in DistilRoBERTa's shape: speed depends on shape only."""
    if shape == "minilm":
        return BACKBONE
    from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification

    from crossenc.backbone import locate

    names = ["input_ids", "attention_mask"]
    tokenizer = AutoTokenizer.from_pretrained(locate(BACKBONE), model_input_names=names)
    config = RobertaConfig(
        vocab_size=50265, num_hidden_layers=6, max_position_embeddings=514, type_vocab_size=1, num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_trainer(precision: str, device: str, callback: Any, **length: int) -> Any:
    """A Trainer on one device with the reference's clipping, that does nothing but train."""
    from lightning.pytorch import Trainer

    return Trainer(
        precision=precision, accelerator="gpu" if device == "cuda" else "cpu", devices=1, gradient_clip_val=1.0,  # type: ignore[arg-type]
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[callback], **length,
    )  # fmt: skip


def ours(
    file: Path, backbone: str, precision: str, device: str, batch_size: int, skip: int, options: dict[str, Any]
) -> float:
    """Seconds of one epoch, after so many steps."""
    from lightning.pytorch import Callback, seed_everything

    from crossenc import CrossEncoderModule, PairDataModule

    class Clock(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == skip:
                synchronize(device)
                self.start = time.perf_counter()

        def on_train_end(self, *_: Any) -> None:
            synchronize(device)
            self.seconds = time.perf_counter() - self.start

    seed_everything(1, verbose=False)
    clock = Clock()
    trainer = make_trainer(precision, device, clock, max_epochs=1)
    options = dict(options)
    module = CrossEncoderModule(backbone, cuda_graphs=options.pop("cuda_graphs", None))
    data = PairDataModule(str(file), backbone=backbone, batch_size=batch_size, val_size=0, test_size=0, **options)
    trainer.fit(module, data)
    return clock.seconds


def peer(file: Path, backbone: str, precision: str, device: str, batch_size: int, skip: int) -> float:
    """Seconds of one epoch, after so many steps."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == skip:
                synchronize(device)
                self.start = time.perf_counter()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            synchronize(device)
            self.seconds = time.perf_counter() - self.start

    clock = Clock()
    train_peer(file, backbone, precision, device, batch_size=batch_size, callback=clock)
    return clock.seconds


def train_peer(
    file: Path, backbone: str, precision: str, device: str = "cpu", batch_size: int = 64, seed: int = 1,
    callback: Any = None,
) -> Any:  # fmt: skip
    """The peer's model after one epoch, with the settings of its `training_quora_duplicate_questions.py`."""
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
    from transformers import PrinterCallback, set_seed

    from crossenc.backbone import locate
    from crossenc.pairs import read

    set_seed(seed)  # before the head is made
    model = CrossEncoder(locate(backbone), num_labels=1, device=device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = CrossEncoderTrainingArguments(
            output_dir=folder, num_train_epochs=1, per_device_train_batch_size=batch_size, learning_rate=5e-5,
            warmup_steps=0.1, bf16=precision == "bf16-mixed", use_cpu=device == "cpu", seed=seed, eval_strategy="no",
            save_strategy="no", logging_steps=20, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = CrossEncoderTrainer(
            model=model,
            args=arguments,
            train_dataset=read(str(file)).remove_columns("row"),
            loss=BinaryCrossEntropyLoss(model),
            callbacks=[callback] if callback else [],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", default="minilm", choices=["minilm", "distilroberta"])
    parser.add_argument("--pairs", type=int, default=640)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    names = list(OURS | OURS_ON_GPU)
    parser.add_argument("--ours", nargs="+", choices=names, default=names, help="settings; default: all")
    parser.add_argument("--skip", type=int, default=0, help="steps of an epoch before the clock starts")
    parser.add_argument("--precision", nargs="+", default=[*DTYPES], choices=[*DTYPES])
    arguments = begin(parser, "offline", "peer")
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        file, backbone = Path(folder) / "train.tsv", make_backbone(arguments.shape, Path(folder) / "backbone")
        take_rows(arguments.data / "train.tsv", file, arguments.pairs)
        tokens, weights = count(file, backbone)
        rows = arguments.pairs - arguments.skip * arguments.batch_size
        tokens = round(tokens * rows / arguments.pairs)  # on average
        settings = {"device": arguments.device, "batch_size": arguments.batch_size, "skip": arguments.skip}
        contenders: dict[str, Callable[[str], float]] = {"peer": partial(peer, file, backbone, **settings)}
        for name, options in (OURS if arguments.device == "cpu" else OURS_ON_GPU).items():
            if name in arguments.ours:
                contenders[name] = partial(ours, file, backbone, options=options, **settings)
        seconds: dict[tuple[str, str], list[float]] = {}
        for number in range(arguments.rounds + (not arguments.skip)):
            for precision in arguments.precision:
                for name, run in contenders.items():
                    taken = run(precision)
                    gc.collect()
                    if number or arguments.skip:  # the first round fills caches, as the first steps do
                        seconds.setdefault((precision, name), []).append(taken)
    limits = {p: best_matrix_product(DTYPES[p], arguments.device) for p in arguments.precision}
    record = {
        "timed_pairs": rows,
        "timed_tokens": tokens,
        "layer_parameters": weights,
        "best_matrix_product_tflops": {p: limit / 1e12 for p, limit in limits.items()},
        "seconds": {f"{p}, {name}": taken for (p, name), taken in seconds.items()},
    }
    write_record(arguments.out, record)
    print("| precision | | pairs/s | real tokens/s (range) | x peer | MFU |\n|---|---|---|---|---|---|")
    for (precision, name), taken in seconds.items():
        middle, theirs = statistics.median(taken), statistics.median(seconds[precision, "peer"])
        mfu = 6 * weights * tokens / middle / limits[precision]
        print(
            f"| {precision} | {name} | {rows / middle:.0f} | {spread([tokens / one for one in taken], ',.0f')} | "
            f"{theirs / middle:.2f} | {100 * mfu:.0f} % |"
        )


def count(file: Path, backbone: str) -> tuple[int, int]:
    """Real tokens of the file's pairs, and the weights of the backbone's layers, without embeddings and head."""
    from crossenc.backbone import load_model, load_tokenizer, resolve_max_length
    from crossenc.encode import encode
    from crossenc.pairs import read

    encoded = encode(read(str(file)), load_tokenizer(backbone), resolve_max_length(backbone, None))
    model = load_model(backbone)
    weights = sum(p.numel() for name, p in model.named_parameters() if ".layer." in name and p.ndim == 2)
    return sum(encoded["length"][:]), weights


if __name__ == "__main__":
    main()
