"""The training loop: one run, which can stop at any step and continue with the same numbers."""

import dataclasses
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase, Qwen3MoeForCausalLM

from hybrimoe.demo.training.architecture import new_model
from hybrimoe.demo.training.balance_loss import balance_loss, layer_load, load_entropy, router_z_loss
from hybrimoe.demo.training.data import Corpus, WindowSampler, token_byte_lengths
from hybrimoe.demo.training.evaluate import evaluate_stream
from hybrimoe.demo.training.muon import Muon
from hybrimoe.demo.training.run_files import RunFiles
from hybrimoe.demo.training.settings import Settings

__all__ = ["Schedule", "Trainer"]

logger = logging.getLogger(__name__)

ADAM_BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
GRADIENT_CLIP = 1.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning rate by step: warm-up, stable, decay, of a run whose length is not known when it starts.

    The rate climbs to `peak` over `warmup_steps` and stays there until `decay` is called; then it falls linearly to
    `peak * floor` over the steps that were asked for, and the run ends.
    """

    peak: float
    warmup_steps: int
    floor: float = 0.02
    decay_start: int | None = None
    decay_steps: int = 0

    def learning_rate(self, step: int) -> float:
        """Rate of step `step` (from 0)."""
        rate = self.peak * min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.decay_start is None or step < self.decay_start:
            return rate
        progress = min(1.0, (step - self.decay_start + 1) / self.decay_steps)
        return rate * (1.0 - (1.0 - self.floor) * progress)

    @property
    def end(self) -> int | None:
        """Number of steps of the whole run; None while no decay has been asked for."""
        return None if self.decay_start is None else self.decay_start + self.decay_steps


@dataclass(frozen=True, slots=True)
class _Part:
    """What one thread computed of a step; `loads` has one [experts] tensor a layer."""

    gradients: tuple[Tensor, ...]
    losses: dict[str, float]
    loads: list[Tensor]


class Trainer:
    """One run: model, optimiser, schedule and the step counter, which is also the position in the data."""

    def __init__(self, settings: Settings, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, files: RunFiles) -> None:
        self.settings, self.corpus, self.files = settings, corpus, files
        self.byte_lengths = token_byte_lengths(tokenizer)
        self.sampler = WindowSampler(corpus.train, settings.seq_len, settings.batch_size, settings.seed)
        self.model: Qwen3MoeForCausalLM = new_model(settings.shape, settings.seed)
        self.parameters = list(self.model.parameters())
        self.pool = ThreadPoolExecutor(settings.threads, initializer=torch.set_num_threads, initargs=(1,))
        self.optimizers = self._new_optimizers()
        self.schedule = Schedule(settings.learning_rate, settings.warmup_steps)
        self.step = 0
        self._earlier_cpu_s = 0.0
        self._cpu_start_s = time.process_time()
        self._last_log = (time.perf_counter(), 0)
        torch.manual_seed(settings.seed)

    def _new_optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the matrices inside the layers; AdamW for embeddings, routers and norms."""
        stacked, matrices, tables, vectors = (list[Tensor]() for _ in range(4))
        for name, parameter in self.model.named_parameters():
            if name.endswith("gate_up_proj"):
                stacked.append(parameter)
            elif name.endswith("_proj") or ("self_attn" in name and parameter.ndim == 2):
                matrices.append(parameter)
            else:
                (tables if parameter.ndim == 2 else vectors).append(parameter)
        rate = self.settings.learning_rate
        muon = Muon(
            [{"params": stacked, "blocks": 2}, {"params": matrices, "blocks": 1}],
            lr=rate,
            weight_decay=WEIGHT_DECAY,
            pool=self.pool,
        )
        groups = [{"params": tables, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
        return [muon, torch.optim.AdamW(groups, lr=rate, betas=ADAM_BETAS, fused=True)]

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.settings.batch_size * self.settings.seq_len

    @property
    def trained_hours(self) -> float:
        """Processor time a thread since the run began, over all its restarts."""
        cpu_s = self._earlier_cpu_s + time.process_time() - self._cpu_start_s
        return cpu_s / self.settings.threads / 3600

    def resume(self) -> bool:
        """Continues from the run's checkpoint if there is one."""
        state = self.files.load_checkpoint()
        if state is None:
            return False
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.schedule = Schedule(**state["schedule"])
        self.step, self._earlier_cpu_s = state["step"], state["cpu_s"]
        self._last_log = (time.perf_counter(), self.step)
        torch.set_rng_state(state["rng"])
        self.files.drop_metrics_after(self.step)
        return True

    def save(self) -> None:
        """Writes the checkpoint: weights, optimiser, schedule, random state, data position, time used."""
        self.files.save_checkpoint(
            {
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "schedule": dataclasses.asdict(self.schedule),
                "step": self.step,
                "cpu_s": self._earlier_cpu_s + time.process_time() - self._cpu_start_s,
                "rng": torch.get_rng_state(),
            }
        )

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Trains to the end of the schedule, or until `should_stop()`; says whether the end was reached."""
        while not self._at_end():
            if should_stop():
                self.save()
                return False
            self._start_decay_if_due()
            losses, loads = self.train_step()
            if self.step % self.settings.log_steps == 0:
                self._log(losses, loads)
            if self.step % self.settings.evaluate_steps == 0:
                self._log_evaluation()
            if self.step % self.settings.checkpoint_steps == 0:
                self.save()
        self._log_evaluation()
        self.save()
        return True

    def train_step(self) -> tuple[dict[str, float], tuple[Tensor, ...]]:
        """One update; returns the losses before it, and per layer the load [experts] of the batch."""
        inputs, targets = self.sampler.batch(self.step)
        if self.schedule.decay_start is None:
            inputs, targets = (x.reshape(-1, self.settings.stable_seq_len) for x in (inputs, targets))
        parts = self.settings.threads
        results = list(self.pool.map(self._gradients, inputs.chunk(parts), targets.chunk(parts)))
        for parameter, *gradients in zip(self.parameters, *(result.gradients for result in results), strict=True):
            parameter.grad = sum(gradients[1:], gradients[0]).div_(parts)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, GRADIENT_CLIP)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.schedule.learning_rate(self.step)
            optimizer.step()
        self.step += 1
        losses = {name: sum(result.losses[name] for result in results) / parts for name in results[0].losses}
        loads = [torch.stack(layer).mean(dim=0) for layer in zip(*(result.loads for result in results), strict=True)]
        return {**losses, "grad_norm": float(norm)}, tuple(loads)

    def _gradients(self, inputs: Tensor, targets: Tensor) -> "_Part":
        """Losses and gradients of one thread's part [rows, tokens] of the batch."""
        settings = self.settings
        with self._precision():
            output = self.model.model(input_ids=inputs, use_cache=False, output_router_logits=True)
            logits = self.model.lm_head(output.last_hidden_state)
        losses = {
            "loss": functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten()),
            "balance": balance_loss(output.router_logits, settings.shape.top_k),
            "z": router_z_loss(output.router_logits),
        }
        total = losses["loss"] + settings.balance_weight * losses["balance"] + settings.z_weight * losses["z"]
        return _Part(
            gradients=torch.autograd.grad(total, self.parameters),
            losses={name: float(value.detach()) for name, value in losses.items()},
            loads=[layer_load(layer, settings.shape.top_k) for layer in output.router_logits],
        )

    def _precision(self) -> AbstractContextManager[Any]:
        if self.settings.precision == "fp32":
            return nullcontext()
        return torch.autocast("cpu", torch.bfloat16)

    def _at_end(self) -> bool:
        return self.schedule.end is not None and self.step >= self.schedule.end

    def _start_decay_if_due(self) -> None:
        if self.schedule.decay_start is None and (steps := self._due_decay()):
            self.schedule = dataclasses.replace(self.schedule, decay_start=self.step, decay_steps=steps)
            logger.info("decay starts at step %d and takes %d steps", self.step, steps)

    def _due_decay(self) -> int:
        """Steps of the decay that has to start now; 0 if none has."""
        settings, share = self.settings, 1 + self.settings.decay_share
        if settings.max_tokens is not None and self.tokens * share >= settings.max_tokens:
            return max(1, settings.max_tokens // (settings.batch_size * settings.seq_len) - self.step)
        out_of_time = settings.max_hours is not None and self.trained_hours * share >= settings.max_hours
        if out_of_time or self.files.finish.exists():
            return max(1, round(self.step * settings.decay_share))
        return 0

    def _log(self, losses: dict[str, float], loads: tuple[Tensor, ...]) -> None:
        now, (then, step_then) = time.perf_counter(), self._last_log
        self._last_log = (now, self.step)
        step_tokens = self.settings.batch_size * self.settings.seq_len
        record = {
            "step": self.step,
            "tokens": self.tokens,
            "hours": round(self.trained_hours, 4),
            "learning_rate": self.schedule.learning_rate(self.step - 1),
            **{name: round(value, 5) for name, value in losses.items()},
            "tokens_per_s": round((self.step - step_then) * step_tokens / (now - then), 1),
            "entropy": [round(load_entropy(load), 4) for load in loads],
            "max_share": [round(float(load.max()), 4) for load in loads],
        }
        self.files.append_metrics(record)
        logger.info("step %d loss %.4f %.0f tokens/s", self.step, losses["loss"], record["tokens_per_s"])

    def _log_evaluation(self) -> None:
        results = {
            domain: evaluate_stream(
                self.model, stream, self.byte_lengths, self.settings.stable_seq_len, self.settings.evaluate_windows
            )
            for domain, stream in self.corpus.held_out.items()
            if len(stream) > 1
        }
        bits = {domain: round(result.bits_per_byte, 4) for domain, result in results.items()}
        nats = {domain: round(result.nats_per_token, 4) for domain, result in results.items()}
        self.files.append_metrics({"step": self.step, "tokens": self.tokens, "bits_per_byte": bits, "nats": nats})
        logger.info("step %d held-out bits per byte %s", self.step, bits)
