"""Train a sparse network with Lightning (``pip install lightning``): ``python examples/with_lightning.py``.

Started again, it goes on where it was.
"""

from pathlib import Path
from typing import Any

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import sparseopt_kernels as sk

EPOCHS = 10
FOLDER = Path("with_lightning")


def make_model() -> nn.Module:
    hidden = [nn.Linear(64, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU()]
    hidden += [nn.Linear(512, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(128, 10))


def data() -> tuple[TensorDataset, TensorDataset]:
    """Return 1,297 images of digits to train on, and 500 to test on."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    return TensorDataset(images[500:], labels[500:]), TensorDataset(images[:500], labels[:500])


class SparseClassifier(lightning.LightningModule):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.model = make_model()
        # Here, and not in configure_optimizers: a checkpoint with masks is loaded into masks.
        self.masks = sk.sparsify(self.model, sparsity=0.95, seed=0)
        self.dst = sk.RigL(self.masks, update_every=25, stop_at=0.75 * steps)
        self.steps = steps

    def configure_optimizers(self) -> dict[str, Any]:
        opt = sk.SparseOpt(
            self.model.parameters(),
            lr=0.1,
            momentum=0.9,
            weight_decay=5e-4,
            masks=self.masks,
            max_grad_norm=1.0,  # in place of Trainer's gradient_clip_val
        )
        schedule = CosineAnnealingLR(opt, self.steps)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.dst.step()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["dst"] = self.dst.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.dst.load_state_dict(checkpoint["dst"])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("test accuracy", (self.model(images).argmax(dim=1) == labels).float().mean())


def main() -> None:
    lightning.seed_everything(0)
    train, test = data()
    loader = DataLoader(train, batch_size=64, shuffle=True)
    module = SparseClassifier(EPOCHS * len(loader))
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        devices=1,  # on several, each makes its part of the steps: divide them in SparseClassifier
        logger=False,
        default_root_dir=FOLDER,
        callbacks=[lightning.pytorch.callbacks.ModelCheckpoint(FOLDER, save_last=True)],
    )
    last = FOLDER / "last.ckpt"
    trainer.fit(module, loader, ckpt_path=last if last.exists() else None)
    trainer.test(module, DataLoader(test, batch_size=500))
    print(module.masks)


if __name__ == "__main__":
    main()
