"""Train a sparse network on several processes, each with all weights and its part of each batch:
``torchrun --nproc-per-node 2 examples/ddp.py``.
"""

import os

import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import sparseopt_kernels as sk

EPOCHS = 10


def make_model() -> nn.Module:
    # SyncBatchNorm, which uses the statistics of the whole batch, is for GPUs alone.
    hidden = [nn.Linear(64, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU()]
    hidden += [nn.Linear(512, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(128, 10))


def data() -> tuple[TensorDataset, TensorDataset]:
    """Return 1,297 images of digits to train on, and 500 to test on."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    return TensorDataset(images[500:], labels[500:]), TensorDataset(images[:500], labels[:500])


def main() -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if on_gpu else "gloo")

    torch.manual_seed(0)
    train, test = data()
    sampler = DistributedSampler(train, drop_last=True)
    loader = DataLoader(train, batch_size=64 // distributed.get_world_size(), sampler=sampler)
    steps = EPOCHS * len(loader)

    model = make_model().to(device)
    masks = sk.sparsify(model, sparsity=0.95, seed=0)  # the same on every rank
    ddp = DistributedDataParallel(model)
    opt = sk.SparseOpt(
        ddp.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, masks=masks, max_grad_norm=1.0
    )
    dst = sk.RigL(masks, update_every=25, stop_at=0.75 * steps)
    schedule = CosineAnnealingLR(opt, steps)

    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        ddp.train()
        for images, labels in loader:
            opt.zero_grad()
            F.cross_entropy(ddp(images.to(device)), labels.to(device)).backward()  # averages the gradients
            dst.step()  # on every rank
            opt.step()
            schedule.step()

    if distributed.get_rank() == 0:
        model.eval()
        with torch.no_grad():
            images, labels = (tensor.to(device) for tensor in test.tensors)
            accuracy = (model(images).argmax(dim=1) == labels).float().mean()
        print(f"{masks}\ntest accuracy {accuracy:.1%}")
        torch.save(model.state_dict(), "ddp.pt")  # with the masks
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
