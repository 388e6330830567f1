"""Toy tasks for the loop: one network, and a generator with a discriminator after the two-engine recipe."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unitok.core.distributed import all_reduce_sum_, rank, world_size
from unitok.core.engine import EngineConfig
from unitok.core.loop import train
from unitok.core.optim import OptimizerConfig
from unitok.core.rng import torch_rng
from unitok.core.run import TrainConfig
from unitok.core.runlog import read_log
from unitok.core.task import Network, Task


class BadGradient(torch.autograd.Function):
    """Identity whose gradient is infinite: the loss stays finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("inf")


class ToyNet(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 4)
        self.dropout = nn.Dropout(dropout)
        self.spoil = False
        self.seen_dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        self.seen_dtype = hidden.dtype
        hidden = F.gelu(self.norm(hidden))
        if self.spoil:
            hidden = BadGradient.apply(hidden)
        return self.second(self.dropout(hidden))


class ToyTask(Task):
    """Regression. `event` is (kind, step, rank): kill, term, nan (loss) or inf (gradient) at that step on that rank."""

    name = "toy"
    num_samples = 50

    def __init__(
        self, dropout: float = 0.0, ema: float | None = 0.9, event: tuple[str, int, int] | None = None
    ) -> None:
        self.dropout, self.ema, self.event = dropout, ema, event
        self.steps_seen = 0

    def build(self) -> dict[str, Network]:
        torch.manual_seed(0)
        optimizer = OptimizerConfig(lr=1e-2, warmup_steps=2, weight_decay=0.1)
        return {"net": Network(ToyNet(self.dropout), optimizer, self.ema)}

    def load_batch(self, indices: list[int], epoch: int) -> tuple[Tensor, Tensor]:
        x = torch.stack([torch.randn(8, generator=torch_rng("toy", index)) for index in indices])
        return x, x[:, :4] * 2 + x[:, 4:].sin() + 0.01 * epoch

    def _happens(self, kind: str, step: int) -> bool:
        return self.event is not None and self.event == (kind, step, rank())

    def micro_step(self, engines: dict[str, Any], batch: Any, micro_index: int, step: int) -> dict[str, Tensor]:
        if self._happens("kill", step):
            os.kill(os.getpid(), signal.SIGKILL)
        if micro_index == 0 and self._happens("term", step):
            os.kill(os.getpid(), signal.SIGTERM)
        engine = engines["net"]
        engine.module.spoil = self._happens("inf", step)
        loss = F.mse_loss(engine(batch[0].to(engine.device)).float(), batch[1].to(engine.device))
        if self._happens("nan", step):
            loss = loss * float("nan")
        engine.backward(loss)
        return {"loss": loss.detach()}

    def after_step(self, modules: dict[str, nn.Module], step: int) -> None:
        self.steps_seen += 1

    def extra_state(self) -> dict[str, Any]:
        return {"steps_seen": self.steps_seen}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.steps_seen = state["steps_seen"]

    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, module in modules.items():
            torch.save({key: value.clone() for key, value in module.state_dict().items()}, folder / f"{name}.pt")


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.last = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.Conv2d(8, 3, 3, padding=1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = F.gelu(self.norm(self.body(x)))
        return self.last(hidden), hidden.square().mean(), hidden


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def adversarial_networks() -> tuple[Generator, Discriminator]:
    torch.manual_seed(0)
    return Generator(), Discriminator()


START = 4
LEARNING_RATES = (2e-3, 1e-3)


class AdversarialTask(ToyTask):
    """The recipe for two engines: both gradients at a detached reconstruction, one backward pass per engine."""

    name = "adversarial"
    headline = ("loss", "discriminator")

    def build(self) -> dict[str, Network]:
        generator, discriminator = adversarial_networks()
        constant = {"schedule": "constant", "weight_decay": 0.0}
        return {
            "generator": Network(generator, OptimizerConfig(lr=LEARNING_RATES[0], **constant), self.ema),
            "discriminator": Network(
                discriminator, OptimizerConfig(lr=LEARNING_RATES[1], start_step=START, **constant), start_step=START
            ),
        }

    def load_batch(self, indices: list[int], epoch: int) -> Tensor:
        return torch.stack([torch.randn(3, 8, 8, generator=torch_rng("image", index)) for index in indices])

    def micro_step(self, engines: dict[str, Any], batch: Any, micro_index: int, step: int) -> dict[str, Tensor]:
        if self._happens("kill", step):
            os.kill(os.getpid(), signal.SIGKILL)
        generator, discriminator = engines["generator"], engines["discriminator"]
        pixels = batch.to(generator.device)
        reconstruction, extra, hidden = generator(pixels)
        leaf = reconstruction.detach().float().requires_grad_()
        loss = F.l1_loss(leaf, pixels)
        (gradient,) = torch.autograd.grad(loss, leaf)
        metrics = {"loss": loss, "extra": extra}
        started = step >= START
        if started:
            (fool,) = torch.autograd.grad(-discriminator.module(leaf).float().mean(), leaf)
            weight = _adaptive_weight(hidden.detach().float(), gradient, fool)
            gradient = gradient + 0.5 * weight * fool
            metrics["weight"] = weight
        generator.backward(0.1 * extra + (reconstruction * gradient).sum())
        if started:
            logits = discriminator(torch.cat([pixels, leaf.detach()])).float()
            real, fake = logits.chunk(2)
            metrics["discriminator"] = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
            discriminator.backward(metrics["discriminator"])
        return {name: value.detach() for name, value in metrics.items()}


def _adaptive_weight(hidden: Tensor, reconstruction: Tensor, adversarial: Tensor) -> Tensor:
    shape = torch.Size((3, 8, 3, 3))
    both = torch.stack(
        [torch.nn.grad.conv2d_weight(hidden, shape, g, padding=1) for g in (reconstruction, adversarial)]
    )
    norms = (all_reduce_sum_(both) / world_size()).flatten(1).norm(dim=1)
    return norms[0] / (norms[1] + 1e-4)


def plain_adversarial_losses(batches: list[list[Tensor]]) -> list[dict[str, float]]:
    """The same training in plain torch, one process: the adaptive weight by autograd at the last layer."""
    generator, discriminator = adversarial_networks()
    betas = (0.9, 0.95)
    g_adam = torch.optim.AdamW(generator.parameters(), LEARNING_RATES[0], betas, weight_decay=0.0)
    d_adam = torch.optim.AdamW(discriminator.parameters(), LEARNING_RATES[1], betas, weight_decay=0.0)
    history = []
    for step, micro_batches in enumerate(batches):
        logged: dict[str, float] = {}
        g_adam.zero_grad()
        d_grads = [torch.zeros_like(p) for p in discriminator.parameters()]
        for pixels in micro_batches:
            reconstruction, extra, _ = generator(pixels)
            loss = F.l1_loss(reconstruction, pixels)
            total = loss + 0.1 * extra
            values = {"loss": loss, "extra": extra}
            if step >= START:
                fool = -discriminator(reconstruction).mean()
                at = generator.last.weight
                norms = [torch.autograd.grad(x, at, retain_graph=True)[0].norm() for x in (loss, fool)]
                values["weight"] = norms[0] / (norms[1] + 1e-4)
                total = total + 0.5 * values["weight"] * fool
                real, fake = discriminator(pixels), discriminator(reconstruction.detach())
                values["discriminator"] = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
                found = torch.autograd.grad(values["discriminator"], list(discriminator.parameters()))
                d_grads = [a + g / len(micro_batches) for a, g in zip(d_grads, found, strict=True)]
            gradients = torch.autograd.grad(total / len(micro_batches), list(generator.parameters()))
            for parameter, gradient in zip(generator.parameters(), gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            for name, value in values.items():
                logged[name] = logged.get(name, 0.0) + float(value.detach()) / len(micro_batches)
        g_adam.step()
        if step >= START:
            for parameter, gradient in zip(discriminator.parameters(), d_grads, strict=True):
                parameter.grad = gradient
            d_adam.step()
        history.append(logged)
    return history


def run_toy(
    task: Task,
    out: Path | str,
    steps: int = 20,
    global_batch: int = 4,
    world: int = 1,
    evaluators: Any = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Train and return the log without timing. `settings` beginning with `engine_` go to the engine."""
    engine = {key.removeprefix("engine_"): settings.pop(key) for key in list(settings) if key.startswith("engine_")}
    engine = {"gradient_clipping": 0.0, "zero3_persistence": 0, "accumulation_steps": 2, **engine}
    config = TrainConfig(
        output_dir=str(out),
        steps=steps,
        engine=EngineConfig(micro_batch_size=global_batch // world, **engine),
        **settings,
    )
    train(task, config, evaluators=evaluators)
    return read_log(Path(out) / "log.jsonl")


def largest_difference(log: list[dict[str, Any]], other: list[dict[str, Any]], keys: tuple[str, ...]) -> float:
    """Largest relative difference of the metrics `keys` between two logs of equal length."""
    assert [r["step"] for r in log] == [r["step"] for r in other]
    worst = 0.0
    for a, b in zip(log, other, strict=True):
        for key in keys:
            assert (key in a) == (key in b), (a["step"], key)
            if key in a:
                worst = max(worst, abs(a[key] - b[key]) / max(abs(b[key]), 1e-12))
    return worst if math.isfinite(worst) else float("inf")


def spoil(folder: Path) -> None:
    """Change one byte of a checkpoint."""
    file = folder / "net.ema.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
