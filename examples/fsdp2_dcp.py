"""Train a sparse network whose weights are shared out over several processes (FSDP2), with checkpoints that
any number of processes can load (DCP): ``torchrun --nproc-per-node 2 examples/fsdp2_dcp.py``. Started again,
it goes on where it was.
"""

import os
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F  # noqa: N812
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import sparseopt_kernels as sk

EPOCHS = 10
CHECKPOINTS = Path("fsdp2")


def make_model() -> nn.Sequential:
    hidden = [nn.Linear(64, 512, bias=False), nn.LayerNorm(512), nn.ReLU()]
    hidden += [nn.Linear(512, 128, bias=False), nn.LayerNorm(128), nn.ReLU()]
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
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))

    torch.manual_seed(0)
    train, test = data()
    sampler = DistributedSampler(train, drop_last=True)
    loader = DataLoader(train, batch_size=64 // distributed.get_world_size(), sampler=sampler)
    steps = EPOCHS * len(loader)

    model = make_model().to(device)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    masks = sk.sparsify(model, sparsity=0.95, seed=0)
    opt = sk.SparseOpt(  # after fully_shard, which makes new parameters
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, masks=masks, max_grad_norm=1.0
    )
    dst = sk.RigL(masks, update_every=25, stop_at=0.75 * steps)
    schedule = CosineAnnealingLR(opt, steps)

    def state() -> dict[str, object]:
        """Return what a checkpoint has. Its tensors are this rank's parts, and are loaded in place."""
        model_state, opt_state = get_state_dict(model, opt)
        return {
            "model": model_state,  # with the masks
            "opt": opt_state,
            "dst": dst.state_dict(),
            "schedule": schedule.state_dict(),
        }

    saved = sorted(path.parent for path in CHECKPOINTS.glob("*/.metadata"))  # it is written last
    if saved:
        loaded = state()
        dcp.load(loaded, checkpoint_id=saved[-1])
        set_state_dict(model, opt, model_state_dict=loaded["model"], optim_state_dict=loaded["opt"])
        dst.load_state_dict(loaded["dst"])
        schedule.load_state_dict(loaded["schedule"])
    done = int(saved[-1].name) if saved else 0

    for epoch in range(done, EPOCHS):
        sampler.set_epoch(epoch)
        model.train()
        for images, labels in loader:
            opt.zero_grad()
            F.cross_entropy(model(images.to(device)), labels.to(device)).backward()
            dst.step()  # on every rank
            opt.step()
            schedule.step()
        dcp.save(state(), checkpoint_id=CHECKPOINTS / f"{epoch + 1:03}")

    model.eval()
    with torch.no_grad():  # on every rank: a forward pass gathers the weights, layer by layer
        images, labels = (tensor.to(device) for tensor in test.tensors)
        accuracy = (model(images).argmax(dim=1) == labels).float().mean()
    told = f"{masks}\ntest accuracy {accuracy:.1%}"  # str(masks) on every rank, too
    if distributed.get_rank() == 0:
        print(told)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
