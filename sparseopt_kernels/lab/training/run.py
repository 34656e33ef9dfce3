"""One run: one network trained by one optimizer from one seed, epoch by epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel

from ...optimizer import SparseOpt
from ...schedules import warmup_cosine
from ...topology.rigl import RigL
from ...topology.set import SET
from ...topology.sparsify import sparsify
from . import distributed
from .by_hand import MaskedSGD
from .config import Config
from .data import Data, split_order, steps_per_epoch
from .epoch_updates import EpochUpdates
from .errors import TrainingError
from .evaluation import as_many_on_all_ranks, sums_over
from .models import build_model

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler

_CORRECTION = {"sparseopt": "layer", "sgd": "none", "unnormalized": "unnormalized"}
_STOP_AT = 0.75  # of all steps: the masks do not change in the last quarter (RigL)
_AMP_TYPES = {"none": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Row:
    """The results of one epoch. Losses are mean cross entropies, accuracies and rates are in [0, 1].

    ``train_loss`` and ``train_accuracy`` are averages over the epoch while the weights change. ``lr`` is that
    of the epoch's last step, ``seconds`` the time of its training steps without the test. ``status`` is
    ``"ok"``, or ``"diverged"`` if a loss was not finite; it is the run's last row then. ``dead_share`` is the
    fraction of the neurons without an active weight. The fields after it are those of the epoch's
    :class:`EpochUpdates`. The last four are NaN if the row is from an older checkpoint.
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
    dead_share: float = math.nan
    grown: float = math.nan
    died: float = math.nan
    largest_share: float = math.nan


class Run:
    """A network in training. Two runs of one seed have the same initial weights, masks and order of examples,
    whatever their optimizer. The caller's random state does not change.

    Under torchrun, each rank trains on its part of every batch. Gradients are averaged, and so weights and
    masks are the same on all ranks; with ``config.parallel`` ``"fsdp"``, each rank has a part of them. Batch
    normalisation uses the statistics of a rank's part, and the running statistics are averaged before a test.

    Args:
        config: the configuration of the experiment.
        dataset: the data set ``config.data``, on the device.
        optimizer: ``"sgd"``, ``"sparseopt"``, ``"unnormalized"`` (D alone) or ``"by-hand"``.
        seed: the seed of all random numbers.

    Raises:
        TrainingError: a batch is too small to be shared by the ranks, or ``min_fan_in`` too large for the
            sparsity.
    """

    def __init__(self, config: Config, dataset: Data, optimizer: str, seed: int) -> None:
        self.config = config
        self.dataset = dataset
        self.optimizer_name = optimizer
        self.seed = seed
        self.epoch = 0
        self.diverged = False
        self.batch: tuple[Tensor, Tensor]  # images and labels of the last step
        self._device = distributed.local_device(config.device)
        with torch.random.fork_rng(devices=self._cuda_devices()):
            torch.manual_seed(seed)
            self.model = build_model(config.model, dataset.image_shape, dataset.num_classes)
            self.model.to(self._device)
            if config.channels_last:
                self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self._random_state = self._get_random_state()
        try:
            self.masks = sparsify(
                self.model, config.sparsity, config.distribution, min_fan_in=config.min_fan_in, seed=seed
            )
        except ValueError as error:  # --min-fan-in needs more active weights than the sparsity leaves
            raise TrainingError(str(error)) from error
        if self.is_sharded:
            from .sharded_model import shard

            shard(self.model, self.masks, self._device)
        self.initial_fan_in = self.fan_in()
        self.optimizer = self._make_optimizer()
        self._scaler = _scaler(config.amp, self._device)
        self._forward = self.model if self.is_sharded else self._replicated()
        steps = steps_per_epoch(dataset.train_size, config.batch_size)
        _check_share(dataset.train_size // steps)
        self.schedule = warmup_cosine(
            self.optimizer,
            config.warmup_epochs * steps,
            config.epochs * steps,
            start_lr=config.start_lr,
            end_lr=config.end_lr,
        )
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
                skip_step=config.skip_step,
                min_fan_in=config.min_fan_in,
            )

    def _make_optimizer(self) -> SparseOpt | MaskedSGD:
        config = self.config
        if self.optimizer_name == "by-hand":
            return MaskedSGD(
                self.model.parameters(),
                self.masks,
                max_grad_norm=config.max_grad_norm,
                skips=lambda: self.topology is not None and self.topology.skip_next,
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
            max_grad_norm_over=config.max_grad_norm_over,
            backend=config.backend,
        )

    @property
    def is_sharded(self) -> bool:
        """True if each rank has a part of the parameters."""
        return self.config.parallel == "fsdp"

    @property
    def done(self) -> bool:
        return self.diverged or self.epoch == self.config.epochs

    def train_epoch(self, on_step: Callable[[], object] = lambda: None) -> Row:
        """Train one epoch and test.

        Args:
            on_step: called after each step.
        """
        started = time.perf_counter()
        self._updates = EpochUpdates()
        with self._own_random_state(), _reproducible(self._device):
            train_loss, train_accuracy, lr = self._train(on_step)
        seconds = time.perf_counter() - started
        distributed.average_statistics(self.model)
        test_loss, test_accuracy = self._test()
        self.epoch += 1
        self.diverged = not (math.isfinite(train_loss) and math.isfinite(test_loss))
        if self.diverged:
            train_accuracy = test_accuracy = math.nan  # the argmax of NaN scores means nothing
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
            dead_share=self.masks.dead_share(),
            **self._updates._asdict(),
        )

    def _train(self, on_step: Callable[[], object]) -> tuple[float, float, float]:
        self.model.train()
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)  # losses, and correct predictions
        lr = 0.0
        batches = split_order(torch.randperm(self.dataset.train_size), self.config.batch_size)
        shares = [distributed.share_of(batch) for batch in batches]
        on_this_rank = self.dataset.train_batches(shares, self.seed, self.epoch)
        for batch, (images, labels) in zip(batches, on_this_rank, strict=True):
            self.batch = images, labels
            self.optimizer.zero_grad()
            with self._autocast():
                scores = _at_least_float32(self._forward(self._formatted(images)))
                loss = F.cross_entropy(scores, labels)
            sums[0] += loss.detach() * len(labels)
            sums[1] += (scores.argmax(dim=1) == labels).sum()
            if distributed.ranks() > 1:
                # DDP averages the gradients over ranks; with this weight, that is the mean over the examples.
                loss = loss * (distributed.ranks() * len(labels) / len(batch))
            self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            if self.topology:
                self.topology.step()
                if self.topology.updated:
                    self._updates = self._updates.with_update(self.topology.last_update)
            lr = float(self.optimizer.param_groups[0]["lr"])
            self._scaler.step(self.optimizer)
            self._scaler.update()
            self.schedule.step()
            on_step()
        loss_sum, correct = distributed.sum_over_ranks(sums).tolist()
        return loss_sum / self.dataset.train_size, correct / self.dataset.train_size, lr

    def _test(self) -> tuple[float, float]:
        batches = self.dataset.test_batches(distributed.rank(), distributed.ranks())
        if self.is_sharded:
            batches = as_many_on_all_ranks(batches, self.dataset.image_shape, self._device)
        with self._autocast():
            sums = sums_over(self.model, ((self._formatted(images), labels) for images, labels in batches))
        loss_sum, correct = distributed.sum_over_ranks(sums.to(self._device)).tolist()
        return loss_sum / self.dataset.test_size, correct / self.dataset.test_size

    def _replicated(self) -> nn.Module:
        """Return the model, or with several ranks the wrapper that averages gradients in ``backward``."""
        if distributed.ranks() == 1:
            return self.model
        # Buffers need not be broadcast in every step: masks are equal on all ranks, and the statistics of
        # batch normalisation are averaged once per epoch.
        names = ("forward_sync_buffers", "broadcast_buffers")  # the latter before PyTorch 2.13
        known = signature(DistributedDataParallel).parameters
        off: dict[str, Any] = {next(name for name in names if name in known): False}
        return DistributedDataParallel(self.model, **off)

    def _autocast(self) -> torch.autocast:
        dtype = _AMP_TYPES[self.config.amp]
        return torch.autocast(self._device.type, dtype, enabled=dtype is not None)

    def _formatted(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self.config.channels_last else images

    def fan_in(self) -> dict[str, list[int]]:
        """Return the current fan-in of each neuron, by masked layer."""
        return {name: self.masks.fan_in(p).tolist() for name, p in self.masks.named().items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which :meth:`load_state_dict` continues, bit for bit.

        If parameters are sharded, it has this rank's part of them, for ``torch.distributed.checkpoint``.
        """
        if self.is_sharded:
            from .sharded_model import sharded_state

            own = sharded_state(self.model, self.optimizer)
        else:
            own = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {
            "optimizer_name": self.optimizer_name,
            "seed": self.seed,
            "epoch": self.epoch,
            **own,
            "schedule": self.schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
            "topology": self.topology.state_dict() if self.topology else None,
            "random_state": self._random_state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the ``state_dict`` of a run with the same configuration."""
        assert (state["optimizer_name"], state["seed"]) == (self.optimizer_name, self.seed)
        self.epoch = state["epoch"]
        if self.is_sharded:
            from .sharded_model import load_sharded_state

            load_sharded_state(self.model, self.optimizer, state)
        else:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])
        if self.topology:
            self.topology.load_state_dict(state["topology"])
        self._random_state = state["random_state"]

    def weights(self) -> dict[str, Any]:
        """Return the model's ``state_dict`` with whole tensors; if they are sharded, on rank 0 alone."""
        if not self.is_sharded:
            return self.model.state_dict()
        from .sharded_model import whole_weights

        return whole_weights(self.model)

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


def _scaler(amp: str, device: torch.device) -> GradScaler:
    """Return a scaler, enabled for float16 alone: bfloat16 has the exponents of float32."""
    return torch.amp.GradScaler(device.type, enabled=amp == "float16")


def _at_least_float32(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _check_share(batch: int) -> None:
    """Raise ``TrainingError`` if a rank's part of a batch has one example, which has no variance to normalise
    by."""
    if distributed.ranks() > 1 and batch < 2 * distributed.ranks():
        raise TrainingError(
            f"a batch of {batch} is shared by {distributed.ranks()} ranks: each needs at least 2 examples, "
            "so name a larger --batch-size or start fewer"
        )


@contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """Make cuDNN choose deterministic algorithms, so that a resumed run gives the same bits."""
    if device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        yield
