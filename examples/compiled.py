"""Train a sparse network with ``torch.compile`` (needs a C++ compiler): ``python examples/compiled.py``."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import sparseopt_kernels as sk

EPOCHS = 10


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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, test = data()
    loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)  # one shape: compiled once
    steps = EPOCHS * len(loader)

    model = make_model().to(device)
    masks = sk.sparsify(model, sparsity=0.95, seed=0)
    opt = sk.SparseOpt(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, masks=masks, max_grad_norm=1.0
    )
    dst = sk.RigL(masks, update_every=25, stop_at=0.75 * steps)
    schedule = CosineAnnealingLR(opt, steps)

    @torch.compile
    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images), labels)

    # The steps of SparseOpt and RigL are outside: they have kernels of their own.
    for _ in range(EPOCHS):
        model.train()
        for images, labels in loader:
            opt.zero_grad()
            loss_of(images.to(device), labels.to(device)).backward()
            dst.step()
            opt.step()
            schedule.step()

    model.eval()
    with torch.no_grad():
        images, labels = (tensor.to(device) for tensor in test.tensors)
        accuracy = (model(images).argmax(dim=1) == labels).float().mean()
    print(f"{masks}\ntest accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
