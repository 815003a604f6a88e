"""The training loop: one `Run`, from its first update to its last, whatever interrupts it.

A run owns what it is made of besides the weights: optimizer moments, the place in the data, the carried state, the
random generators of dropout, the best weights so far, the sums not yet logged. All of it is in the checkpoint, so a run
that was stopped at any step and resumed gives the weights and metrics of the run that was not.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import (
    CheckpointError,
    flatten_optimizer,
    load_checkpoint,
    random_states,
    restore_optimizer,
    restore_random_states,
    save_checkpoint,
)
from .config import TrainConfig
from .evaluate import Batches, TrainingError, detached, evaluate, run_batch, to_device, token_losses
from .metrics import MetricsLog
from .models import LanguageModel

CHECKPOINT = "last.safetensors"
METRICS = "metrics.jsonl"

Event = dict[str, Any]


@dataclasses.dataclass
class TrainResult:
    """How a run ended.

    Attributes:
        reason: "max_steps", "max_epochs", "max_time", "early stop", "callback" or "signal".
        elapsed: seconds of training, those before a resume included.
        best: the validation record with the lowest loss, None without validation.
        signal: the number of the signal that ended it, else None.
    """

    reason: str
    step: int
    tokens: int
    elapsed: float
    best: Event | None = None
    signal: int | None = None


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that ``config`` names, over all parameters that need a gradient."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(weights, config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(weights, config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay)


def default_prompt(model: LanguageModel) -> str:
    """What a sample continues: nothing where the model has a start token, else a new line or the first known piece."""
    if model.generation_config.start_token_id is not None or model.tokenizer is None:
        return ""
    return "\n" if model.tokenizer.id("\n") is not None else model.tokenizer.decode([0], skip_specials=False)


class Run:
    """A training run in progress; every attribute set in `_start` is part of the checkpoint."""

    def __init__(
        self, model: LanguageModel, batches: Batches, config: TrainConfig, valid: Batches | None, out: Path | None,
        on_event: Callable[[Event], object] | None, chars_per_token: float | None, extra: dict[str, Any],
    ) -> None:  # fmt: skip
        self.model, self.batches, self.config, self.valid, self.out = model, batches, config, valid, out
        self.on_event, self.chars_per_token, self.extra = on_event, chars_per_token, extra
        self.optimizer = make_optimizer(model, config)
        self.device = next(model.parameters()).device
        self.prompt = default_prompt(model) if config.sample_prompt is None else config.sample_prompt
        if config.sample_every:
            model.encode(self.prompt)  # unknown characters are better known now than at the first sample
        self.signal: int | None = None
        self.stopped_by_callback = False
        self.log: MetricsLog | None = None
        self.at_epoch_end, self.validated_at = False, -1
        self._start()

    def _start(self) -> None:
        self.step = self.epoch = self.tokens = 0
        self.elapsed = 0.0
        self.scale, self.bad_evals, self.bad_for_decay = 1.0, 0, 0
        self.best: Event | None = None
        self.best_weights: dict[str, Tensor] = {}
        self.state: Any = None
        # Since the last training record: loss, negative log-likelihood, tokens, steps; on the device, read when logged.
        self.sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        self.grad_norm = torch.zeros((), device=self.device)

    # --- the loop ---

    def loop(self) -> TrainResult:
        self.model.train()
        self.clock = time.monotonic() - self.elapsed
        self.logged = (time.monotonic(), self.tokens)
        reason = self._reason()
        while reason is None:
            before = self.step
            for batch in self.batches:
                self._update(batch)
                reason = self._after_update()
                if reason:
                    break
            else:
                if self.step == before and not self._resumed_at_epoch_end():
                    raise TrainingError(
                        "the training data hold no batch: the corpus is shorter than one batch; "
                        "give more text, or a smaller batch_size or seq_len"
                    )
                self.epoch += 1
                self.state = None
                reason = self._reason()
        return self._finish(reason)

    def _resumed_at_epoch_end(self) -> bool:
        at_end, self.at_epoch_end = self.at_epoch_end, False
        return at_end

    def _update(self, batch: Any) -> None:
        """One weight update."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(self.step, self._progress(), self.scale)
        state = self.state if batch.carry else None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            logits, state = run_batch(self.model, batch, state, self.device)
        total, weight = token_losses(logits, batch.targets.to(self.device), to_device(batch.weight, self.device))
        loss = total / weight if config.reduction == "mean" else total
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if config.clip:
            self.grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip).detach()
        self.optimizer.step()
        self.state = detached(state) if batch.carry else None
        self.sums += torch.stack([loss.detach(), total.detach(), weight, torch.ones_like(weight)]).double()
        self.step += 1
        self.tokens += batch.targets.numel()
        self.elapsed = time.monotonic() - self.clock

    def _progress(self) -> float:
        """The share of the run that is done, by the tightest limit."""
        config, done = self.config, 0.0
        if config.max_steps:
            done = self.step / config.max_steps
        if config.max_epochs:
            done = max(done, self.step / (config.max_epochs * max(len(self.batches), 1)))
        if config.max_time:
            done = max(done, self.elapsed / config.max_time)
        return done

    def _after_update(self) -> str | None:
        """Log, validate, sample and save where they are due, and say why the run ends, if it does."""
        config, step = self.config, self.step
        if step % config.log_every == 0:
            self._log_training()
        if self.valid is not None and config.eval_every and step % config.eval_every == 0:
            self._validate()
        if config.sample_every and step % config.sample_every == 0:
            self._sample()
        reason = self._reason()
        if self.out and config.save_every and step % config.save_every == 0 and not reason:
            self.save()
        return reason

    def _reason(self) -> str | None:
        config = self.config
        if self.signal is not None:
            return "signal"
        if self.stopped_by_callback:
            return "callback"
        for reason, value, limit in (
            ("max_steps", self.step, config.max_steps), ("max_epochs", self.epoch, config.max_epochs),
            ("max_time", self.elapsed, config.max_time), ("early stop", self.bad_evals, config.patience),
        ):  # fmt: skip
            if limit is not None and value >= limit:
                return reason
        return None

    def _finish(self, reason: str) -> TrainResult:
        """Save, then validate once more: in this order, for the checkpoint must not know that the run was to end."""
        self._check_finite()
        if self.out:
            self.save()
        if reason not in ("signal", "callback"):
            if self.sums[3] > 0:
                self._log_training()
            if self.valid is not None and (self.best is None or self.validated_at != self.step):
                self._validate()
        if self.best is not None:
            self._load_weights(self.best_weights)
        return TrainResult(reason, self.step, self.tokens, self.elapsed, self.best, self.signal)

    # --- records ---

    def _emit(self, event: str, record: Event) -> None:
        record = {"event": event, "step": self.step, "epoch": self.epoch, **record}
        if self.log:
            self.log.append(record)
        if self.on_event and self.on_event(record):
            self.stopped_by_callback = True

    def _check_finite(self) -> None:
        if not math.isfinite(float(self.sums[1])):
            raise TrainingError(
                f"the loss is {float(self.sums[1])} at step {self.step}: lower lr (now {self.config.lr:g}), or set "
                "clip; the checkpoint written before is unharmed"
            )

    def _log_training(self) -> None:
        self._check_finite()
        loss, nll, count, steps = self.sums.tolist()
        now, (then, tokens) = time.monotonic(), self.logged
        self._emit("train", {
            "loss": loss / steps, "nll": nll / max(count, 1.0), "lr": self.optimizer.param_groups[0]["lr"],
            **({"grad_norm": float(self.grad_norm)} if self.config.clip else {}), "tokens": self.tokens,
            "tok_per_s": round((self.tokens - tokens) / max(now - then, 1e-9)), "elapsed": round(self.elapsed, 3),
        })  # fmt: skip
        self.sums.zero_()
        self.logged = (now, self.tokens)

    def _validate(self) -> None:
        config = self.config
        record = evaluate(self.model, self.valid, limit=config.eval_batches, reduction=config.reduction,
                          chars_per_token=self.chars_per_token)  # fmt: skip
        self.validated_at = self.step
        record["elapsed"] = round(time.monotonic() - self.clock, 3)
        better = self.best is None or record["nll"] < self.best["nll"]
        if better:
            self.best = {"step": self.step, **record}
            self.best_weights = {name: weight.clone() for name, weight in self._weights().items()}
            if self.out:
                self._save_model()
        self.bad_evals = 0 if better else self.bad_evals + 1
        self.bad_for_decay = 0 if better else self.bad_for_decay + 1
        if self.bad_for_decay > config.decay_patience:
            self.scale, self.bad_for_decay = self.scale * config.decay_factor, 0
        self._emit("valid", {**record, "best": better})

    def _sample(self) -> None:
        config = self.config
        result = self.model.generate(
            self.prompt, max_new_tokens=config.sample_tokens, temperature=config.sample_temperature,
            seed=config.seed,
            sequence_id=self.step,
        )  # fmt: skip
        self._emit("sample", {"text": result.text, "prompt": self.prompt})

    # --- checkpoints ---

    def _weights(self) -> dict[str, Tensor]:
        """Parameters and buffers by name, each shared tensor once, detached but not copied."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {name: tensor.detach() for name, tensor in named}

    def _load_weights(self, weights: dict[str, Tensor]) -> None:
        own = self._weights()
        if {name: tuple(t.shape) for name, t in own.items()} != {name: tuple(t.shape) for name, t in weights.items()}:
            raise CheckpointError("the checkpoint is of another network: its weights have other names or shapes")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(weights[name])

    def _save_model(self) -> None:
        try:
            self.model.save_pretrained(self.out)
        except OSError as problem:
            raise CheckpointError(f"cannot save the model in {self.out}: {problem.strerror or problem}") from problem

    def save(self) -> None:
        """Write the checkpoint, and the model's folder where no validation chooses it."""
        self._check_finite()
        if not all(bool(weight.isfinite().all()) for weight in self._weights().values()):
            raise TrainingError(
                f"the weights are not finite at step {self.step}: lower lr (now {self.config.lr:g}), or set clip; the "
                "checkpoint written before is unharmed"
            )
        carried = self.state if isinstance(self.state, tuple) else () if self.state is None else (self.state,)
        moments, numbers = flatten_optimizer(self.optimizer)
        tensors = {
            **{f"model.{name}": weight for name, weight in self._weights().items()},
            **{f"best.{name}": weight for name, weight in self.best_weights.items()},
            **{f"carried.{index}": part for index, part in enumerate(carried)},
            **moments, **random_states(self.device), "sums": self.sums, "grad_norm": self.grad_norm,
        }  # fmt: skip
        state = {name: getattr(self, name) for name in _SAVED}
        save_checkpoint(self.out / CHECKPOINT, tensors, {
            **state, "config": self.config.to_dict(), "network": self.model.config.to_dict(), "optimizer": numbers,
            "data": self.batches.state_dict(), "extra": self.extra,
        })  # fmt: skip
        if self.best is None:
            self._save_model()

    def load(self) -> None:
        """Continue from the last checkpoint in ``out``."""
        if self.out is None:
            raise ValueError("resume needs out=, the folder of the run to continue")
        tensors, state = load_checkpoint(self.out / CHECKPOINT)
        if state["network"] != self.model.config.to_dict():
            raise CheckpointError(
                f"{self.out} holds another network: {state['network']}; this one is {self.model.config.to_dict()}"
            )
        self.config.resumed_from(TrainConfig.from_dict(state["config"]))
        groups: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            group, _, name = key.partition(".")
            groups.setdefault(group, {})[name] = tensor.to(self.device)
        self.batches.load_state_dict(state["data"])
        self._load_weights(groups["model"])
        self.best_weights = groups.get("best", {})
        carried = tuple(groups.get("carried", {}).values())
        self.state = None if not carried else carried if len(carried) == 2 else carried[0]
        self.sums, self.grad_norm = groups["sums"][""], groups["grad_norm"][""]
        for name in _SAVED:
            setattr(self, name, state[name])
        self.at_epoch_end = True
        restore_optimizer(self.optimizer, tensors, state["optimizer"])
        restore_random_states(tensors, self.device)


_SAVED = ("step", "epoch", "tokens", "elapsed", "scale", "bad_evals", "bad_for_decay", "best")
