"""The objective inside `transformers.Trainer`, for people with a Hugging Face stack.

The Trainer keeps what it is good at: TrainingArguments, launchers, callbacks, loggers, the hub.
Changed is only what decides the loss: every term is divided once, by its count over all
micro-batches of the step and over all processes. The Trainer itself divides by the number of
tokens, so that a second term added to its loss would grow with the accumulation steps.

Read in transformers 5.17 and 5.23, trainer.py: `_run_epoch` takes the micro-batches of a step from
`get_batch_samples` and hands its second result to each `compute_loss` as `num_items_in_batch`.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from arra.data.views import common_grid
from arra.files import atomic_dir
from arra.image_tokenizers import load_image_tokenizer
from arra.integrations.hf_data import MICRO_BATCH, PreparedImages, RunInOrder, collate
from arra.models.base import Backbone
from arra.models.folders import without_progress_bar
from arra.models.loading import save_skeleton
from arra.objective import Objective
from arra.train.monitor import log_line
from arra.train.optim import clip, decayed_parameters
from arra.train.setup import Step
from arra.train.tally import StepSums

PROJECTORS = "projectors.safetensors"
"""In a checkpoint, beside the model's own files: training only."""

Inputs = dict[str, Any]
"""What the collator gives: `MICRO_BATCH` -> a MicroBatch."""


class TrainedModule(Step):
    """Backbone and objective as the one module that the Trainer wraps, with what it asks of one."""

    accepts_loss_kwargs = True  # a loss needs no further division by the accumulation steps

    @property
    def config(self) -> Any:
        """A copy of the model's, for loggers and DeepSpeed. The Trainer writes `use_cache` into it,
        which would be saved with the model."""
        return copy.copy(self.model.config)

    @property
    def _no_split_modules(self) -> Any:
        return self.model._no_split_modules

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int | None = None,
        offload: bool = False,
    ) -> None:
        """What transformers before 5.18 calls."""
        self.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs, every_n_layers=every_n_layers, offload=offload
        )

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """The same under its newer name."""
        self.model.activation_checkpointing_enable(
            activation_checkpointing_kwargs, every_n_layers=every_n_layers, offload=offload
        )


class ArraTrainer(Trainer):
    """Trains a painter with alignment; logs loss_ar, loss_gva, gva_constant and retrieval.

    A checkpoint is an ordinary folder of the model, with the projectors in a file of their own.

    Args:
        backbone: `arra.load_model(...)`, or a language model grown by `load_for_training`.
        objective: what is minimised; its targets are features of the dataset.
        args: as for any Trainer.
        train_dataset: a split, in the Trainer's order or (`PreparedImages.in_order`) in ours.
        eval_dataset: a split; its losses are means over its images, whatever the batch size.
        schedule: the factor on every lambda at optimizer step s of n, as schedule(s, n); None = 1.

    Raises:
        ValueError: arguments under which lambda would not mean what it says.
    """

    loss_is_scaled_for_ga = True
    backbone: Backbone
    objective: Objective

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective,
        args: TrainingArguments,
        train_dataset: PreparedImages | RunInOrder | None = None,
        eval_dataset: PreparedImages | None = None,
        *,
        schedule: Callable[[int, int], float] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        _check(args, train_dataset)
        self.backbone, self.objective = backbone, objective
        self.schedule = schedule or (lambda step, steps: 1.0)
        self._sums = StepSums()
        super().__init__(
            model=TrainedModule(backbone, objective),
            args=args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=list(callbacks),
            optimizers=optimizers,
        )
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError("FSDP 1 clips all gradients together: use fsdp_config={'version': 2}")
        if self.get_tp_size() * self.get_cp_size() * self.get_sp_size() > 1:
            raise ValueError("ArraTrainer knows data parallelism only: leave out tp, cp and sp")

    # ---- the loss --------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Inputs], num_batches: int, device: torch.device
    ) -> tuple[list[Inputs], Any]:
        """The micro-batches of one optimizer step, and how many things each term averages over."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        parts = [self.objective.counts(inputs[MICRO_BATCH].batch) for inputs in samples]
        counts = {name: sum(part[name] for part in parts) for name in (parts[0] if parts else ())}
        if counts and self.args.world_size > 1:
            total = torch.tensor([*counts.values()], device=device)
            total = self.accelerator.reduce(total, "sum")
            counts = dict(zip(counts, total.tolist(), strict=True))
        return samples, counts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """This micro-batch's share of the step's loss.

        Args:
            num_items_in_batch: term -> count, from `get_batch_samples`: the Trainer hands it on.
        """
        factor = self.schedule(self.state.global_step, self.state.max_steps)
        terms = model(inputs[MICRO_BATCH], factor)
        self._sums.add_terms(terms)
        # Every engine takes the mean of the processes' gradients: their sum is wanted.
        loss = terms.total(num_items_in_batch) * self.args.world_size
        return (loss, terms) if return_outputs else loss

    # ---- the optimizer ---------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Those of matrices; norms, biases and token tables do not decay, as in `arra train`."""
        decayed = {id(p) for p in decayed_parameters(self.backbone.model, self.objective)}
        return [name for name, parameter in model.named_parameters() if id(parameter) in decayed]

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """The projectors are clipped apart from the model, as in `arra train`."""
        if self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)  # the engine has done it, all in one
        self.accelerator.unscale_gradients()
        norms = clip(self.backbone.model, self.objective, self.args.max_grad_norm)
        return norms["grad_norm"]

    # ---- what is logged --------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the terms to the Trainer's own training line."""
        if "loss" in logs and "learning_rate" in logs:
            means, self._sums = self._means(self._sums), StepSums()
            step = max(self.state.global_step - 1, 0)
            factor = self.schedule(step, self.state.max_steps)
            lambdas = {target.name: target.weight * factor for target in self.objective.targets}
            named = {
                "lambda" if len(lambdas) == 1 else f"lambda/{n}": v for n, v in lambdas.items()
            }
            logs = {**logs, **log_line(means), **named}
        super().log(logs, start_time)

    def _means(self, own: StepSums) -> dict[str, float]:
        """Over all processes; reads the device."""
        counts = [own.counts[name] for name in own.names]
        both = torch.stack([own.values(), own.values().new_tensor(counts)])
        sums, counts = self.accelerator.reduce(both, "sum").tolist()
        return {n: s / c for n, s, c in zip(own.names, sums, counts, strict=True) if c}

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The mean terms over a split. All processes do as many batches, as sharded weights ask:
        one whose share is shorter repeats a batch that does not count."""
        images = dataloader.dataset
        assert isinstance(images, PreparedImages)
        size, world = self.args.eval_batch_size, self.args.world_size
        parts = [range(i, min(i + size, len(images))) for i in range(0, len(images), size)]
        sums, factor = StepSums(), self.schedule(self.state.global_step, self.state.max_steps)
        model: Any = self.model
        model.eval()
        for first in range(0, len(parts), world):
            own = first + self.args.process_index
            micro = images.batch(parts[min(own, len(parts) - 1)]).to(self.args.device)
            with torch.no_grad(), self.accelerator.autocast():
                terms = model(micro, factor)
            sums.add_terms(terms, counted=own < len(parts))  # all processes sum the same names
            self.control = self.callback_handler.on_prediction_step(
                self.args, self.state, self.control
            )
        means = self._means(sums)
        line = {"loss": sum(weight * means[n] for n, weight in terms.weights.items())}
        line |= log_line(means)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in line.items()}
        return EvalLoopOutput(None, None, metrics, len(images))  # type: ignore[arg-type]

    # ---- files -----------------------------------------------------------------------------------

    def export(self, out: str) -> Path:
        """Writes the painter as `arra export` does: `arra generate` and `arra.Pipeline` open it.

        Args:
            out: a new folder; the image tokenizer is that of the training dataset.
        """
        images = self.train_dataset
        assert isinstance(images, (PreparedImages, RunInOrder))
        rows, captions = images.loader.dataset, images.loader.captions
        manifest = rows.manifest
        tokenizer = load_image_tokenizer(manifest.tokenizer.spec)
        if tokenizer.fingerprint != manifest.tokenizer.fingerprint:
            raise ValueError(
                f"{manifest.tokenizer.spec} is no longer the image tokenizer that the dataset was "
                f"prepared with: put the original back in its place"
            )
        info = manifest.text_features[captions.name] if captions else None
        words = (
            {"spec": info.spec, "length": info.length, "fingerprint": info.encoder}
            if info
            else None
        )
        weights = self.accelerator.get_state_dict(self.model) if self._engine_saves else None
        if not self.args.should_save:
            return Path(out)
        with atomic_dir(Path(out)) as temporary, without_progress_bar():
            save_skeleton(
                self.backbone,
                temporary,
                grid=common_grid(rows.first.grids),
                image_tokenizer="image_tokenizer",
                fingerprint=tokenizer.fingerprint,
                trained_vocabulary="all" if self.objective.vocabulary_V is None else "image",
                text_encoder=words,
            )
            self.backbone.model.save_pretrained(temporary / "model", state_dict=_of_model(weights))
            tokenizer.save_pretrained(temporary / "image_tokenizer")
        return Path(out)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """An ordinary folder of the model and its text tokenizer.

        Args:
            state_dict: of the whole module, where an engine had to gather it.
        """
        if not self.args.should_save:
            return
        folder = output_dir or str(self.args.output_dir)
        self.backbone.model.save_pretrained(folder, state_dict=_of_model(state_dict))
        if self.backbone.text_tokenizer is not None:
            self.backbone.text_tokenizer.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and not self._engine_saves:
            save_file(self.objective.state_dict(), Path(output_dir) / PROJECTORS)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self._engine_saves:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        file = Path(resume_from_checkpoint) / PROJECTORS
        if not file.is_file():
            raise ValueError(f"{file} is missing: a run that saved only its model cannot resume")
        self._load_weights(resume_from_checkpoint)
        self.objective.load_state_dict(load_file(file))

    def _load_best_model(self) -> None:
        if self._engine_saves:
            super()._load_best_model()
            return
        assert self.state.best_model_checkpoint is not None
        self._load_weights(self.state.best_model_checkpoint)

    def _load_weights(self, folder: str) -> None:
        # Names in files may be others than in memory: the model's own class knows both.
        stored = type(self.backbone).open_model(Path(folder))
        self.backbone.model.load_state_dict(stored.state_dict())

    @property
    def _engine_saves(self) -> bool:
        """FSDP and DeepSpeed write and read the whole module, projectors included."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)


def _of_model(weights: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Of a whole module's weights those of the model, under its own names."""
    if weights is None:
        return None
    own = {name: tensor for name, tensor in weights.items() if name.startswith("model.")}
    return {name.removeprefix("model."): tensor for name, tensor in own.items()}


def _check(args: TrainingArguments, images: PreparedImages | RunInOrder | None) -> None:
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process: start one process each, with torchrun "
            f"--nproc-per-node {args.n_gpu}, or show one GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    if args.label_smoothing_factor:
        raise ValueError("label_smoothing_factor: the objective has none, leave it at 0")
    if not isinstance(images, RunInOrder):
        return
    step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.train_sampling_strategy != "sequential" or args.max_steps != images.steps:
        raise ValueError(
            f"a dataset in our order needs train_sampling_strategy='sequential' and "
            f"max_steps={images.steps}"
        )
    if step != images.loader.batch_size:
        raise ValueError(
            f"the dataset is in order for {images.loader.batch_size} samples a step, but "
            f"per_device_train_batch_size x gradient_accumulation_steps x processes is {step}"
        )
