"""Train a sparse network with Accelerate (``pip install accelerate``), on one process or several:
``accelerate launch examples/with_accelerate.py``. Started again, it goes on where it was.
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import sparseopt_kernels as sk

EPOCHS = 10
CHECKPOINTS = Path("with_accelerate")


def make_model() -> nn.Module:
    hidden = [nn.Linear(64, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU()]
    hidden += [nn.Linear(512, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(128, 10))


def data() -> tuple[TensorDataset, TensorDataset]:
    """Return 1,297 images of digits to train on, and 500 to test on."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    return TensorDataset(images[500:], labels[500:]), TensorDataset(images[:500], labels[:500])


class Epochs:
    """The number of epochs that are done, as Accelerate saves and loads it."""

    done = 0

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


def main() -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    train, test = data()
    loader = DataLoader(train, batch_size=32, shuffle=True)

    model = make_model()
    masks = sk.sparsify(model, sparsity=0.95, seed=0)
    opt = sk.SparseOpt(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, masks=masks, max_grad_norm=1.0
    )
    schedule = CosineAnnealingLR(opt, EPOCHS * -(-len(loader) // 2))
    model, opt, loader, schedule = accelerator.prepare(model, opt, loader, schedule)
    steps = EPOCHS * -(-len(loader) // 2)  # of the optimizer, on each process
    dst, epochs = sk.RigL(masks, update_every=25, stop_at=0.75 * steps), Epochs()
    accelerator.register_for_checkpointing(dst, epochs)
    complete = sorted(CHECKPOINTS.glob("[0-9]*"))
    if complete:
        accelerator.load_state(str(complete[-1]))

    while epochs.done < EPOCHS:
        model.train()
        for images, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(images), labels))
                if accelerator.sync_gradients:  # once per step of the optimizer, not for each batch
                    dst.step()
                opt.step()
                schedule.step()
                opt.zero_grad()
        epochs.done += 1
        accelerator.save_state(str(CHECKPOINTS / "new"))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:  # a kill before this leaves the one of the last epoch
            (CHECKPOINTS / "new").rename(CHECKPOINTS / f"{epochs.done:03}")
        accelerator.wait_for_everyone()

    model.eval()
    with torch.no_grad():
        images, labels = (tensor.to(accelerator.device) for tensor in test.tensors)
        accuracy = (accelerator.unwrap_model(model)(images).argmax(dim=1) == labels).float().mean()
    accelerator.print(f"{masks}\ntest accuracy {accuracy:.1%}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
