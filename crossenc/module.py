"""CrossEncoderModule: a backbone with one logit, its loss, its optimizer and its metrics."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim import Optimizer

from .backbone import DEFAULT_BACKBONE, freeze_first_layers, load_model, resolve_max_length
from .encode import PairBatch
from .errors import CheckpointError, UsageError, require
from .forward import pair_logits
from .metrics import PairMetrics
from .optim import make_optimizer, make_schedule, parameter_groups
from .sharding import shard

CHECKPOINT_VERSION = 1


class CrossEncoderModule(LightningModule):
    """Scores a pair of texts with one logit, trained with `BCEWithLogitsLoss`.

    Args:
        backbone: A Hub id, a local folder, or `package:NAME/PATH`, a folder inside an installed package.
        max_length: Longest pair in tokens, special tokens included; null is all that the backbone can take.
        learning_rate: Highest learning rate, reached at the end of the warm-up. 5e-5 is the reference recipe's.
        weight_decay: Decay of matrices; biases and layer norms never decay.
        warmup: Share of all steps over which the learning rate rises; from 1 on a number of steps.
        schedule: What the learning rate does then: a name that `transformers.get_scheduler` knows.
        optimizer: Name of an optimizer in `torch.optim`.
        pos_weight: Weight of a duplicate's loss; a non-duplicate's is 1.
        label_smoothing: Labels are drawn this far towards 1/2, in training only: 0.1 makes 0.05 and 0.95 of 0 and 1.
        freeze_layers: The embeddings and this many first layers are not trained; 0 trains all.
        gradient_checkpointing: Compute activations again in the backward pass: less memory, about a third slower.
        attn_implementation: `eager`, `sdpa`, `flash_attention_2`; null lets transformers choose.
        lora: Arguments of `peft.LoraConfig`, such as `{r: 16, lora_alpha: 32}`; then only the adapter and the head
            are trained, and the export holds the merged weights. Needs the extra `lora`.
        trust_remote_code: Run model code that comes with a Hub id.
        revision: Branch, tag or commit of a Hub id.
        backbone_sha256: Refuse a local `model.safetensors` with another digest.

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
        pos_weight: float | None = None,
        label_smoothing: float = 0.0,
        freeze_layers: int = 0,
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
        lora: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        backbone_sha256: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise UsageError(f"model.label_smoothing {label_smoothing} is not in [0, 1)")
        if pos_weight is not None and pos_weight <= 0:
            raise UsageError(f"model.pos_weight {pos_weight} is not above 0")
        if warmup < 0 or learning_rate <= 0:
            raise UsageError("model.warmup must be at least 0 and model.learning_rate above 0")
        self.save_hyperparameters()
        self.max_length = resolve_max_length(backbone, max_length, trust_remote_code, revision)
        self.model: Any = load_model(backbone, attn_implementation, trust_remote_code, revision, backbone_sha256)
        freeze_first_layers(self.model, freeze_layers)
        if lora is not None:
            self.model = _add_lora(self.model, lora)
        if gradient_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.val_metrics, self.test_metrics = PairMetrics(), PairMetrics()
        self.threshold: float | None = None
        self.figures: dict[str, float] = {}

    def configure_model(self) -> None:
        """Shard the weights where the strategy is made for it; Lightning asks for it once for each stage."""
        if self.device_mesh is not None:
            shard(self, self.device.type, self.trainer.world_size)

    def forward(self, batch: PairBatch) -> Tensor:
        """Logits of shape (pairs,), in fp32."""
        return pair_logits(self.model, batch)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each pair, shape (pairs,): labels from 0 to 1, smoothed while training."""
        if self.training and self.hparams["label_smoothing"]:
            labels = torch.lerp(labels, torch.full_like(labels, 0.5), self.hparams["label_smoothing"])
        weight = self.hparams["pos_weight"]
        weight = None if weight is None else labels.new_tensor(weight)
        return binary_cross_entropy_with_logits(logits, labels, pos_weight=weight, reduction="none")

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        losses = self.loss(self(batch), batch["label"])
        # Not the batch's own mean: batches are of unequal size, and every pair of the epoch weighs the same.
        loss = losses.sum() / batch.get("mean_pairs", len(losses))
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(losses), sync_dist=True)
        return loss

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: PairBatch, batch_idx: int) -> None:
        self._evaluate(batch, self.test_metrics)

    def _evaluate(self, batch: PairBatch, metrics: PairMetrics) -> None:
        logits = self(batch)
        metrics.update(logits.sigmoid(), batch["label"], self.loss(logits, batch["label"]))

    def on_validation_epoch_end(self) -> None:
        """Choose the threshold on the dev pairs and keep it with the weights."""
        figures = self.val_metrics.compute()
        self.val_metrics.reset()
        if not self.trainer.sanity_checking:  # a look at two batches is no evaluation
            self.threshold = figures["threshold"]
            self._report("val", figures)

    def on_test_epoch_start(self) -> None:
        # Never the test pairs' own best; one half where no dev pairs have chosen a threshold.
        self.test_metrics.threshold = 0.5 if self.threshold is None else self.threshold

    def on_test_epoch_end(self) -> None:
        self._report("test", self.test_metrics.compute())
        self.test_metrics.reset()

    def _report(self, split: str, figures: dict[str, float]) -> None:
        named = {f"{split}/{name}": value for name, value in figures.items()}
        self.figures |= named
        # sync_dist averages what is equal on all ranks already, and spares users Lightning's advice to set it.
        self.log_dict(named, sync_dist=True)

    def predict_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Tensor]:
        """Rows, logits and scores (after the sigmoid) of a batch, each of shape (pairs,)."""
        logits = self(batch)
        return {"row": batch["row"], "logit": logits, "score": logits.sigmoid()}

    def configure_optimizers(self) -> Any:
        """AdamW with linear warm-up and decay, unless the arguments say otherwise."""
        optimizer = make_optimizer(
            self.hparams["optimizer"],
            parameter_groups(self.model, self.hparams["weight_decay"]),
            self.hparams["learning_rate"],
            fused=self.trainer.precision != "16-mixed",  # whose gradient scaler does not go with Lightning's clipping
        )
        steps = self.trainer.estimated_stepping_batches
        schedule = make_schedule(self.hparams["schedule"], optimizer, self.hparams["warmup"], steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """As Lightning does it, but for bf16 and a fused optimizer too, which Lightning refuses for fp16's sake."""
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm") and self._mixed_without_scaler():
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _mixed_without_scaler(self) -> bool:
        plugin = self.trainer.precision_plugin
        return isinstance(plugin, MixedPrecision) and plugin.scaler is None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what an export tells besides the weights; plain types only, or `weights_only` refuses the file."""
        checkpoint["crossenc"] = {
            "version": CHECKPOINT_VERSION,
            "threshold": self.threshold,
            "figures": dict(self.figures),
            "training": {
                "precision": str(self.trainer.precision),
                "devices": self.trainer.world_size,
                "accumulate_grad_batches": self.trainer.accumulate_grad_batches,
                "gradient_clip_val": self.trainer.gradient_clip_val,
            },
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back threshold and figures; raises `CheckpointError` for a checkpoint that is not ours."""
        kept = checkpoint.get("crossenc", {})
        if kept.get("version") != CHECKPOINT_VERSION:
            raise CheckpointError(
                f"the checkpoint has format {kept.get('version')} and this crossenc reads {CHECKPOINT_VERSION}; "
                "export it with the version that wrote it"
            )
        self.threshold = kept["threshold"]
        self.figures = dict(kept["figures"])


def _add_lora(model: Any, arguments: dict[str, Any]) -> Any:
    peft = require("peft", "lora")
    try:
        return peft.get_peft_model(model, peft.LoraConfig(**{"task_type": "SEQ_CLS"} | arguments))
    except (TypeError, ValueError) as error:
        raise UsageError(f"model.lora: {error}") from error
