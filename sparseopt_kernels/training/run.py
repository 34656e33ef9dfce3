"""One run: one network trained by one optimizer from one seed, epoch by epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ..optimizer import SparseOpt
from ..schedules import warmup_cosine
from ..topology.dynamic import SET, RigL
from ..topology.sparsify import sparsify
from .by_hand import MaskedSGD
from .config import Config
from .data import Dataset, batches, steps_per_epoch
from .models import build_model

_CORRECTION = {"sparseopt": "layer", "sgd": "none"}
_STOP_AT = 0.75  # of all steps: the masks stay as they are in the last quarter (RigL)
_TEST_BATCH = 1000


@dataclass(frozen=True)
class Row:
    """What is known after one epoch. Losses are mean cross entropies, accuracies and rates in [0, 1].

    ``train_loss`` and ``train_accuracy`` are averages over the epoch while the weights change. ``lr`` is
    that of the epoch's last step, ``seconds`` the time of its training steps, testing excluded.
    ``status`` is ``"ok"``, or ``"diverged"`` when a loss was not finite: it is the run's last row then.
    """

    optimizer: str
    seed: int
    epoch: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    sparsity: float
    exploration_rate: float
    lr: float
    seconds: float
    status: str


class Run:
    """A network in training. Two runs of one seed have the same initial weights, masks and order of
    examples, whatever their optimizer; the random state of the caller is never touched."""

    def __init__(self, config: Config, dataset: Dataset, optimizer: str, seed: int) -> None:
        self.config = config
        self.dataset = dataset
        self.optimizer_name = optimizer
        self.seed = seed
        self.epoch = 0
        self.diverged = False
        self.batch: tuple[Tensor, Tensor]  # images and labels of the last step
        self._device = torch.device(config.device)
        with torch.random.fork_rng(devices=self._cuda_devices()):
            torch.manual_seed(seed)
            self.model = build_model(config.model, dataset.image_shape, dataset.num_classes).to(self._device)
            self._random_state = self._get_random_state()
        self.masks = sparsify(self.model, config.sparsity, config.distribution, seed=seed)
        self.initial_fan_in = self.fan_in()
        self.optimizer = self._make_optimizer()
        steps = steps_per_epoch(len(dataset.train_labels), config.batch_size)
        self.schedule = warmup_cosine(self.optimizer, config.warmup_epochs * steps, config.epochs * steps)
        self.topology: SET | RigL | None = None
        if config.method != "static":
            topology: Callable[..., SET | RigL] = partial(SET, seed=seed)
            if config.method == "rigl":
                topology = partial(RigL, regrow=config.regrow)
            self.topology = topology(
                self.masks,
                config.drop_fraction,
                config.update_every,
                stop_at=_STOP_AT * config.epochs * steps,
            )

    def _make_optimizer(self) -> SparseOpt | MaskedSGD:
        config = self.config
        if self.optimizer_name == "by-hand":
            return MaskedSGD(
                self.model.parameters(),
                self.masks,
                lr=config.lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
            )
        return SparseOpt(
            self.model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            masks=self.masks,
            correction=_CORRECTION[self.optimizer_name],  # type: ignore[arg-type]
            ham_alpha=config.ham_alpha,
            max_grad_norm=config.max_grad_norm,
            backend=config.backend,
        )

    @property
    def done(self) -> bool:
        return self.diverged or self.epoch == self.config.epochs

    def train_epoch(self, on_step: Callable[[], object] = lambda: None) -> Row:
        """Train one epoch and test.

        Args:
            on_step: called after each step.
        """
        started = time.perf_counter()
        with self._own_random_state(), _reproducible(self._device):
            train_loss, train_accuracy, lr = self._train(on_step)
        seconds = time.perf_counter() - started
        test_loss, test_accuracy = evaluate(self.model, self.dataset.test_images, self.dataset.test_labels)
        self.epoch += 1
        self.diverged = not (math.isfinite(train_loss) and math.isfinite(test_loss))
        if self.diverged:
            train_accuracy = test_accuracy = math.nan  # the class of a NaN is no answer
        sparsity = self.masks.sparsity()
        return Row(
            optimizer=self.optimizer_name,
            seed=self.seed,
            epoch=self.epoch,
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            sparsity=sparsity,
            exploration_rate=self.topology.exploration_rate() if self.topology else 1.0 - sparsity,
            lr=lr,
            seconds=seconds,
            status="diverged" if self.diverged else "ok",
        )

    def _train(self, on_step: Callable[[], object]) -> tuple[float, float, float]:
        self.model.train()
        images, labels = self.dataset.train_images, self.dataset.train_labels
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        correct = torch.zeros((), dtype=torch.int64, device=self._device)
        lr = 0.0
        for image_batch, label_batch in batches(
            images, labels, self.config.batch_size, torch.randperm(len(labels))
        ):
            self.batch = image_batch, label_batch
            self.optimizer.zero_grad()
            scores = self.model(image_batch)
            loss = F.cross_entropy(scores, label_batch)
            loss.backward()  # type: ignore[no-untyped-call]
            if self.topology:
                self.topology.step()
            lr = float(self.optimizer.param_groups[0]["lr"])
            self.optimizer.step()
            self.schedule.step()
            loss_sum += loss.detach() * len(label_batch)
            correct += (scores.argmax(dim=1) == label_batch).sum()
            on_step()
        return loss_sum.item() / len(labels), correct.item() / len(labels), lr

    def fan_in(self) -> dict[str, list[int]]:
        """The fan-in of each neuron of each masked layer, now."""
        return {name: self.masks.fan_in(p).tolist() for name, p in self.masks.named().items()}

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`load_state_dict` needs to go on, bit for bit."""
        return {
            "optimizer_name": self.optimizer_name,
            "seed": self.seed,
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "topology": self.topology.state_dict() if self.topology else None,
            "random_state": self._random_state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the run that made ``state`` was; it must have had the same configuration."""
        assert (state["optimizer_name"], state["seed"]) == (self.optimizer_name, self.seed)
        self.epoch = state["epoch"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.topology:
            self.topology.load_state_dict(state["topology"])
        self._random_state = state["random_state"]

    @contextmanager
    def _own_random_state(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=self._cuda_devices()):
            torch.set_rng_state(self._random_state["cpu"])
            if "cuda" in self._random_state:
                torch.cuda.set_rng_state(self._random_state["cuda"], self._device)
            yield
            self._random_state = self._get_random_state()

    def _get_random_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self._device)
        return state

    def _cuda_devices(self) -> list[torch.device]:
        return [self._device] if self._device.type == "cuda" else []


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """The mean cross entropy and the accuracy, in [0, 1]. The model's mode stays as it is."""
    mode = model.training
    model.eval()
    scores = torch.cat([model(batch) for batch in torch.split(images, _TEST_BATCH)])
    model.train(mode)
    loss = F.cross_entropy(scores.double(), labels).item()
    return loss, (scores.argmax(dim=1) == labels).double().mean().item()


@contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """Make cuDNN choose the same algorithms in every run, or a resumed run would not repeat itself."""
    if device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        yield
