"""Train a sparse network in one process: ``python examples/plain.py``.

Started again, it goes on where it was.
"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import sparseopt_kernels as sk

EPOCHS = 10
CHECKPOINT = Path("plain.pt")


def make_model() -> nn.Module:
    hidden = [nn.Linear(64, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU()]
    hidden += [nn.Linear(512, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(128, 10))


def data() -> tuple[TensorDataset, TensorDataset]:
    """Return 1,297 images of digits to train on, and 500 to test on."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    return TensorDataset(images[500:], labels[500:]), TensorDataset(images[:500], labels[:500])


def main() -> None:
    torch.manual_seed(0)
    train, test = data()
    order = torch.Generator()
    loader = DataLoader(train, batch_size=64, shuffle=True, generator=order)
    steps = EPOCHS * len(loader)

    model = make_model()
    masks = sk.sparsify(model, sparsity=0.95, seed=0)
    opt = sk.SparseOpt(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, masks=masks, max_grad_norm=1.0
    )
    dst = sk.RigL(masks, update_every=25, stop_at=0.75 * steps)
    schedule = CosineAnnealingLR(opt, steps)

    parts = {"model": model, "opt": opt, "dst": dst, "schedule": schedule}  # masks are in the model
    done = 0
    if CHECKPOINT.exists():
        saved = torch.load(CHECKPOINT)
        done = saved["epochs"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])

    for epoch in range(done, EPOCHS):
        order.manual_seed(epoch)  # the same batches after a stop
        model.train()
        for images, labels in loader:
            opt.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            dst.step()
            opt.step()
            schedule.step()
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save({"epochs": epoch + 1, **state}, CHECKPOINT.with_suffix(".new"))
        CHECKPOINT.with_suffix(".new").replace(CHECKPOINT)  # a kill leaves the old one or the new one

    model.eval()
    with torch.no_grad():
        images, labels = test.tensors
        accuracy = (model(images).argmax(dim=1) == labels).float().mean()
    print(f"{masks}\ntest accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
