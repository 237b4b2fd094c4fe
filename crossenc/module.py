"""CrossEncoderModule: a backbone with one logit, its loss, its optimizer and its metrics."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Callable
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim import Optimizer

from .backbone import DEFAULT_BACKBONE, load_model, load_tokenizer, resolve_max_length
from .calibration import Calibration, calibrate, last_layer, sigmoid
from .embedding import ReusingEmbedding
from .encode import PairBatch
from .errors import CheckpointError, UsageError, require
from .forward import base_model, can_pack, pair_logits
from .graphs import GraphedModel
from .metrics import PairMetrics, Scored, evaluation_figures, has_both_labels, score_columns
from .optim import freeze_first_layers, make_optimizer, make_schedule, parameter_groups, share_segments

CHECKPOINT_VERSION = 1
# Arguments of `peft.LoraConfig`, without `Any`: for that, jsonargparse would make an object of whatever class the value
# names, and the values of a checkpoint can be a stranger's.
_Plain: TypeAlias = bool | int | float | str
# In lists, `str` comes first, or the name "0" would become a number.
LoraArguments: TypeAlias = dict[str, _Plain | list[str | int | list[int]] | dict[str, _Plain | list[int]] | None]
_RANGES: dict[str, tuple[Callable[[float], bool], tuple[str, ...]]] = {
    "in [0, 1)": (lambda value: 0 <= value < 1, ("label_smoothing", "dropout")),
    "in (0, 1]": (lambda value: 0 < value <= 1, ("layer_decay",)),
    "at least 0 and finite": (lambda value: 0 <= value < math.inf, ("warmup", "weight_decay", "consistency")),
    "above 0 and finite": (lambda value: 0 < value < math.inf, ("learning_rate", "head_rate", "pos_weight")),
}


class CrossEncoderModule(LightningModule):
    """A cross-encoder: one logit for a pair of texts, trained with `BCEWithLogitsLoss`.

    Args:
        backbone: A Hub id, a local folder, or `package:NAME/PATH`, a folder inside an installed package.
        max_length: Maximum length of a pair in tokens, including special tokens; null is the backbone's maximum.
        learning_rate: Peak learning rate, reached at the end of the warm-up. 5e-5 is the reference recipe's.
        weight_decay: Weight decay of matrices; biases and layer norms never decay.
        warmup: Fraction of all steps over which the learning rate rises; a value of 1 or more is a number of steps.
        schedule: Learning rate schedule after the warm-up, by its name in `transformers.get_scheduler`.
        optimizer: Name of an optimizer in `torch.optim`.
        layer_decay: Learning rate of each layer as a fraction of that of the layer above it, and of the last layer as a
            fraction of `learning_rate`. 1 gives all layers the same rate.
        head_rate: Learning rate of the head, as a multiple of `learning_rate`. Measured to help together with a large
            `consistency`; see `benchmarks/README.md` for figures.
        pos_weight: Weight of duplicates in the loss; non-duplicates have weight 1.
        label_smoothing: Move labels this far towards 1/2, in training only: 0.1 turns 0 and 1 into 0.05 and 0.95.
        symmetric: Train on both orders of a pair's texts: on one of them at random, or with `consistency` on both.
        consistency: Weight of the R-Drop term (arXiv 2106.14448): each pair of a batch is computed twice, with
            different dropout and, if `symmetric`, in both orders; the difference between the two is added to the loss.
            0 computes each pair once, in half the time.
        shared_segments: Give the second text the segment embedding of the first, and do not train segment embeddings,
            so that only positions tell the order of the texts. For backbones trained on single texts, such as
            bi-encoders, which know only one segment. Has no effect on backbones without segments.
        dropout: Replace the backbone's own dropout, in its layers and in its attention; null keeps it. With 0,
            `consistency` sees only the order of the texts.
        calibrate: Fit a scale and a shift of the logits on the dev pairs, and fold them into the export.
        freeze_layers: Do not train the embeddings and this many of the first layers; 0 trains everything.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, nearly a third less speed.
        cuda_graphs: Launch all operations of a training step at once on an NVIDIA GPU, which is several times as fast
            with small batches. Null does so with one device, `bf16-mixed` and a backbone like BERT. Cannot be combined
            with accumulated batches or gradient checkpointing; with these, null leaves it off.
        attn_implementation: `eager`, `sdpa`, `flash_attention_2`; null lets transformers choose.
        lora: Arguments of `peft.LoraConfig`, such as `{r: 16, lora_alpha: 32}`: train only the adapter and the head.
            The export holds the merged weights. Needs the extra `lora`.
        revision: Branch, tag or commit of a Hub id.
        backbone_sha256: Refuse a local `model.safetensors` that has another digest.

    Raises:
        BackboneError: The backbone cannot be loaded, or `max_length` or `freeze_layers` does not fit it.
        HubError: The Hub is out of reach.
        UsageError: A number is out of its range.
    """

    def __init__(
        self,
        backbone: str = DEFAULT_BACKBONE,
        max_length: int | None = None,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.0,
        warmup: float = 0.1,
        schedule: str = "linear",
        optimizer: str = "AdamW",
        layer_decay: float = 1.0,
        head_rate: float = 1.0,
        pos_weight: float | None = None,
        label_smoothing: float = 0.0,
        symmetric: bool = False,
        consistency: float = 0.0,
        shared_segments: bool = False,
        dropout: float | None = None,
        calibrate: bool = True,
        freeze_layers: int = 0,
        gradient_checkpointing: bool = False,
        cuda_graphs: bool | None = None,
        attn_implementation: str | None = None,
        lora: LoraArguments | None = None,
        revision: str | None = None,
        backbone_sha256: str | None = None,
    ) -> None:
        super().__init__()
        backbone = str(backbone)  # from Python, it may be a Path
        self.save_hyperparameters()
        # A LightningCLI knows only the arguments of a subclass itself.
        given = dict(locals())  # a copy, because in Python 3.12 a debugger adds names while it is read
        given = {name: given[name] for name in signature(CrossEncoderModule).parameters}
        self.hparams.update({**given, **self.hparams, "backbone": backbone})  # a subclass may have been given a Path
        for name, value in self.hparams.items():
            if isinstance(value, np.generic):  # from Python; in a checkpoint, `weights_only` could not load it
                self.hparams[name] = value.item()
            elif isinstance(value, dict):
                self.hparams[name] = {key: v.item() if isinstance(v, np.generic) else v for key, v in value.items()}
        for allowed, (fits, names) in _RANGES.items():
            for name in names:
                if (value := self.hparams[name]) is not None and not fits(value):
                    raise UsageError(f"model.{name} must be {allowed}, not {value}")
        self.max_length = resolve_max_length(backbone, max_length, revision)
        self.model: Any = load_model(backbone, attn_implementation, revision, backbone_sha256)
        dropouts = [part for part in self.model.modules() if isinstance(part, nn.Dropout)]
        if dropout is not None:
            if not dropouts:
                raise UsageError(f"model.dropout: {self.model.config.model_type} has no dropout to replace")
            for layer in dropouts:
                layer.p = dropout
        # In some models, the dropout of the attention is not a layer.
        drops = any(layer.p for layer in dropouts) or getattr(self.model.config, "attention_dropout", False)
        if consistency and not symmetric and not drops:
            raise UsageError(
                "model.consistency compares two passes over a pair, but without dropout and with the texts in one "
                "order these are the same; set --model.symmetric true, or --model.dropout above 0"
            )
        if shared_segments:
            share_segments(self.model)
        if lora is not None:
            self.model = _add_lora(self.model, lora)
        freeze_first_layers(base_model(self.model), freeze_layers)  # including their adapters
        if gradient_checkpointing:
            self.model.config.use_cache = False  # decoders cache keys and values, and transformers would warn
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        if cuda_graphs and not self._can_graph():
            raise UsageError(
                "model.cuda_graphs needs a backbone like BERT, the default attention, and no gradient checkpointing"
            )
        self.graphed: GraphedModel | None = None
        self.first_step, self.is_logged = 0, True  # of this run; whether the current step logs its loss
        self.metrics = PairMetrics()  # the pairs of the current evaluation, whatever their split
        # Whether scores get the calibration fitted on the dev pairs. If not, they stay as they are, and the report says
        # what a calibration would bring.
        self.folds = True
        self._reset_evaluation()

    def _reset_evaluation(self) -> None:
        """Drop what earlier evaluations found."""
        self.threshold: float | None = None
        self.fitted = Calibration()
        self.evaluated_step = -1  # the step that threshold, calibration and figures belong to
        self.figures: dict[str, float] = {}
        self.scored: dict[str, dict[str, NDArray[Any]]] = {}  # the last evaluation of each split, pair by pair

    @property
    def calibration(self) -> Calibration:
        """The calibration of all scores that leave the module."""
        return self.fitted if self.folds else Calibration()

    def setup(self, stage: str) -> None:
        """Check that the data module has the module's options, as it always has on the command line."""
        data = getattr(self.trainer, "datamodule", None)
        backbone = self.hparams["backbone"]
        tokenizer = load_tokenizer(backbone, self.hparams["revision"])
        data_tokenizer = getattr(data, "tokenizer", None) or tokenizer
        if data_tokenizer is not tokenizer and data_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise UsageError(f"data and module have different tokenizers; give PairDataModule({backbone=})")
        if stage == "fit":
            wanted = {"backbone": backbone, "symmetric": self.hparams["symmetric"], "max_length": self.max_length}
            wanted["twice"] = bool(self.hparams["consistency"])
            for name, value in wanted.items():
                if getattr(data, name, value) != value:
                    raise UsageError(f"data and module have different options; give PairDataModule({name}={value!r})")
            self._reset_evaluation()  # an earlier one was of other weights; that of a checkpoint is loaded later

    def configure_model(self) -> None:
        """Shard weights, gradients and optimizer states over all devices if the strategy supports it (fsdp).

        Each layer is a unit, gathered while it computes. The rest is one more unit, gathered while the module computes,
        which therefore must do so through its `__call__`. All devices must compute the same number of batches.
        """
        if self.device_mesh is None:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard
        from transformers.modeling_layers import GradientCheckpointingLayer

        if isinstance(self, FSDPModule):  # Lightning calls this once in each stage
            return
        mesh = init_device_mesh(self.device.type, (self.trainer.world_size,))
        for part in self.modules():
            if isinstance(part, GradientCheckpointingLayer):  # the base class of all layers in transformers
                fully_shard(part, mesh=mesh)
        fully_shard(self, mesh=mesh)

    def on_fit_start(self) -> None:
        self.graphed = None  # an earlier fit may have failed
        wanted = self.hparams["cuda_graphs"]
        possible = self.trainer.accumulate_grad_batches == 1 and self.device_mesh is None and self._can_graph()
        if wanted and not possible:
            raise UsageError("model.cuda_graphs cannot be combined with accumulate_grad_batches or sharded weights")
        if wanted is None:  # only where its gain has been measured
            wanted = self.trainer.world_size == 1 and self.trainer.precision == "bf16-mixed"
        if self.device.type == "cuda" and possible and wanted:
            self.graphed = GraphedModel(base_model(self.model), self.device)

    def on_train_start(self) -> None:
        self.first_step = self.trainer.global_step
        is_default = type(self).configure_optimizers is CrossEncoderModule.configure_optimizers
        # With shards, the schedule is made before the checkpoint is read, which knows of steps with other batches.
        if is_default and self.device_mesh is not None:
            schedule: Any = self.lr_schedulers()
            schedule.lr_lambdas = self.configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas

    def on_train_batch_start(self, batch: PairBatch, batch_idx: int) -> None:
        """Choose the losses to log: those that reach the loggers, and, for callbacks that watch it, the first of a run
        and the last of an epoch. For each one, a GPU waits for the CPU, and devices wait for each other."""
        done, every = self.trainer.global_step, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        logged = self.trainer.should_stop or (every > 0 and (done + 1) % every == 0)  # as Lightning decides it
        is_last = self.trainer.is_last_batch or done + 1 == self.trainer.max_steps
        self.is_logged = logged or is_last or done == self.first_step

    def _can_graph(self) -> bool:
        return can_pack(base_model(self.model)) and not self.hparams["gradient_checkpointing"]

    def on_fit_end(self) -> None:
        self.graphed = None  # graphs hold the addresses of the weights, which move now
        if table := self._reusing_embedding():
            table.release()

    def forward(self, batch: PairBatch) -> Tensor:
        """Logits of shape (pairs,), in fp32.

        A DataLoader of your own can give a tokenizer's padded output, with `label` beside it for training, and `row`
        too, a number for each pair, for evaluation; both of shape (pairs,).
        """
        graphs = self.graphed if self.training and "pieces" in batch else None
        # A callback can change the former; the search for NaN reads from the GPU, which no graph can.
        if graphs and self.trainer.accumulate_grad_batches == 1 and not torch.is_anomaly_enabled():
            return graphs(batch)[:, 0].float()
        return pair_logits(self.model, batch)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each pair, shape (pairs,). Labels, 0 to 1, are smoothed and weighted only in training."""
        if self.training and self.hparams["label_smoothing"]:
            labels = torch.lerp(labels, torch.full_like(labels, 0.5), self.hparams["label_smoothing"])
        weight = self.hparams["pos_weight"] if self.training else None
        weight = None if weight is None else labels.new_full((), weight)  # a tensor of Python's would be copied
        return binary_cross_entropy_with_logits(logits, labels, pos_weight=weight, reduction="none")

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        logits = self(batch)
        losses = self.loss(logits, batch["label"])
        if self.hparams["consistency"]:
            # Put the two rows of each pair together; their numbers are n and n, or n and ~n if one is swapped.
            order = torch.maximum(batch["row"], ~batch["row"]).argsort()
            losses = losses[order].view(-1, 2).mean(1)
            losses = losses + self.hparams["consistency"] * disagreement(*logits[order].view(-1, 2).unbind(1))
        # Not the mean of the batch: batches differ in size, and every pair of the epoch has the same weight.
        loss = losses.sum() / batch.get("mean_pairs", len(losses))
        if self.is_logged:
            self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(losses), sync_dist=True)
        return loss

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        logits = self(batch)
        self.metrics.update(batch["row"], logits, batch["label"], self.loss(logits, batch["label"]))

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Fit the calibration and choose the threshold on the dev pairs, and keep both with the weights."""
        if self.trainer.sanity_checking:  # a few batches are not an evaluation
            self.metrics.reset()
            return
        scored, loss = self._gather()
        self.fitted, crossed = Calibration(), scored.logits
        layer = last_layer(self.model)
        if self.hparams["calibrate"] and layer is not None:
            self.fitted, crossed = calibrate(scored.logits, scored.labels, shifted=layer.bias is not None)
        both_labels = has_both_labels(scored.labels >= 0.5)  # pairs with one label cannot choose a threshold
        columns = score_columns(scored, self.calibration, crossed)
        self._report("val", columns, None if both_labels else self._fixed_threshold(), loss)
        if both_labels:
            self.threshold = self.figures["val/threshold"]
        self.evaluated_step = self.trainer.global_step

    def on_test_epoch_end(self) -> None:
        scored, loss = self._gather()
        columns = score_columns(scored, self.calibration, self.fitted(scored.logits))
        self._report("test", columns, self._fixed_threshold(), loss)  # not the best threshold of the test pairs

    def _fixed_threshold(self) -> float:
        """The threshold that the dev pairs chose, or 0.5 if there is none."""
        return 0.5 if self.threshold is None else self.threshold

    def _gather(self) -> tuple[Scored, float]:
        scored, loss = self.metrics.gather()
        self.metrics.reset()
        if not scored.logits.isfinite().all():
            raise UsageError(
                f"the scores at step {self.trainer.global_step} are NaN or infinite: training has diverged, or the "
                "weights were damaged before; lower --model.learning_rate, or start from other weights"
            )
        return scored, loss

    def _report(self, split: str, columns: dict[str, NDArray[Any]], threshold: float | None, loss: float) -> None:
        figures = evaluation_figures(columns, threshold) | {"loss": loss}
        named = {f"{split}/{name}": value for name, value in figures.items()}
        self.scored[split] = columns
        self.figures |= named
        # The figures are equal on all ranks already; sync_dist only keeps Lightning from advising users to set it.
        self.log_dict(named, sync_dist=True)

    def predict_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Tensor]:
        """Rows, calibrated logits, and scores (after the sigmoid) of a batch, each of shape (pairs,)."""
        logits = self.calibration(self(batch))
        return {"row": batch["row"], "logit": logits, "score": torch.from_numpy(sigmoid(logits.numpy(force=True)))}

    def configure_optimizers(self) -> Any:
        """AdamW with linear warm-up and decay, unless the arguments say otherwise."""
        rates = {name: self.hparams[name] for name in ("weight_decay", "learning_rate", "layer_decay", "head_rate")}
        groups = parameter_groups(base_model(self.model), **rates)
        fused = self.trainer.precision != "16-mixed"  # if fused, Lightning cannot clip fp16's scaled gradients
        optimizer = make_optimizer(self.hparams["optimizer"], groups, rates["learning_rate"], fused)
        schedule = make_schedule(self.hparams["schedule"], optimizer, self.hparams["warmup"], self.planned_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def planned_steps(self) -> float:
        """All steps of the run, including those before it was resumed with other batches; infinity if it has no end.

        The Trainer's own estimate assumes that all epochs had as many batches as the current one: the schedule would
        end too early, or never.
        """
        trainer: Any = self.trainer
        planned: float = trainer.estimated_stepping_batches
        step, epoch = getattr(trainer.datamodule, "begun", (0, 0))
        if not epoch or trainer.max_epochs == -1:
            return planned
        per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        steps: int = step + per_epoch * max(trainer.max_epochs - epoch, 0)
        return steps if trainer.max_steps == -1 else min(steps, int(trainer.max_steps))

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip as Lightning does, but also with bf16 and a fused optimizer, which Lightning refuses because of fp16."""
        plugin = self.trainer.precision_plugin
        if gradient_clip_val and gradient_clip_val > 0 and isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            by_value = gradient_clip_algorithm == "value"
            clip: Any = torch.nn.utils.clip_grad_value_ if by_value else torch.nn.utils.clip_grad_norm_
            clip(self.parameters(), gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Drop old gradients, but keep the memory of the word embeddings' for the next one."""
        if table := self._reusing_embedding():
            table.keep_gradient()
        super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def _reusing_embedding(self) -> ReusingEmbedding | None:
        table = base_model(self.model).get_input_embeddings()
        return table if isinstance(table, ReusingEmbedding) else None

    def evaluation(self) -> dict[str, Any]:
        """What a checkpoint keeps of the validation of these very weights: threshold, calibration and figures."""
        if self.evaluated_step != self.trainer.global_step:
            return {"threshold": None, "calibration": list(Calibration()), "figures": {}}
        return {"threshold": self.threshold, "calibration": list(self.fitted), "figures": dict(self.figures)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what an export needs besides the weights; only plain types, or `weights_only` could not load the file."""
        averaged = averaged_by(self.trainer)
        versions = [f"{name} {version(name)}" for name in ("torch", "lightning", "transformers")]
        checkpoint["crossenc"] = {
            "version": CHECKPOINT_VERSION,
            **self.evaluation(),
            "sharded": self.device_mesh is not None,
            "forward": None if type(self).forward is CrossEncoderModule.forward else type(self).__qualname__,
            "training": {
                "precision": str(self.trainer.precision),
                "hardware": _hardware(self.device),
                "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
                "devices": self.trainer.world_size,
                "accumulate_grad_batches": self.trainer.accumulate_grad_batches,
                "gradient_clip_val": self.trainer.gradient_clip_val,
                **({"averaged by": averaged} if averaged else {}),
            },
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore threshold, calibration and figures; raises `CheckpointError` if format or layers differ."""
        kept = checkpoint.get("crossenc", {})
        if kept.get("version") != CHECKPOINT_VERSION:
            raise CheckpointError(
                f"the checkpoint has format {kept.get('version')}, but this crossenc reads {CHECKPOINT_VERSION}; "
                "export it with the version that wrote it"
            )
        if type(self) is CrossEncoderModule:  # drop what a subclass has besides the model: no export has it either
            weights = {name: part for name, part in checkpoint["state_dict"].items() if name.startswith("model.")}
            if others := layer_shapes(weights) ^ layer_shapes(self.state_dict()):
                raise CheckpointError(
                    f"the checkpoint and {self.hparams['backbone']} differ in their layers, such as {min(others)[0]}; "
                    "load it with the class that was trained"
                )
            checkpoint["state_dict"] = weights
        self.threshold = kept["threshold"]
        self.fitted = Calibration(*kept["calibration"])
        self.figures, self.evaluated_step = dict(kept["figures"]), checkpoint["global_step"]


def layer_shapes(weights: dict[str, Tensor]) -> set[tuple[str, torch.Size]]:
    """The name and shape of every tensor of a state dict: it can be loaded where these are the same."""
    return {(name, values.shape) for name, values in weights.items()}


def averaged_by(trainer: Trainer) -> str | None:
    """The name of the callback that averages the weights, if there is one."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next((type(callback).__name__ for callback in callbacks if isinstance(callback, WeightAveraging)), None)


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{platform.machine()}, {device.type}"
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.is_file() else "", re.MULTILINE)
    return f"{[*names, platform.machine()][0]}, {torch.get_num_threads()} threads"


def disagreement(one: Tensor, other: Tensor) -> Tensor:
    """R-Drop's distance between two predictions, given as logits: the mean of both Kullback-Leibler divergences."""
    return (one.sigmoid() - other.sigmoid()) * (one - other) / 2


def _add_lora(model: Any, arguments: LoraArguments) -> Any:
    peft = require("peft", "lora")
    # If its name is not given, peft does not train a new head, unless it is called score or classifier.
    head = [name for name, part in model.named_children() if name != model.base_model_prefix and [*part.parameters()]]
    try:
        config = peft.LoraConfig(**{"task_type": "SEQ_CLS", "modules_to_save": head} | arguments)
        return peft.get_peft_model(model, config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UsageError(f"model.lora: {error}") from error
