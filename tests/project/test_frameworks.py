"""The snippets of docs/frameworks.md run and train as a plain loop does, where a framework is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparseopt_kernels as sk

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "frameworks.md"
Namespace = dict[str, Any]


def sections() -> dict[str, str]:
    """The Python of each section, by its title; that before the first one is ``""``."""
    text = PAGE.read_text()
    parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    titled = {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}
    block = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return {title: "\n".join(block.findall(part)) for title, part in titled.items()}


def masked_sgd(code: str) -> str:
    """The snippet without the correction: masked SGD, which is easily done by hand."""
    changed = re.sub(r"masks=(self\.)?masks\)", r'masks=\1masks, correction="none")', code)
    assert changed != code
    return changed


class Recorder:
    """The batches that the one network of a snippet is trained on, and its weights before the first."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []
        self.before: dict[str, Tensor] = {}
        self.networks: list[Any] = []

    def watch(self, make_net: Callable[[], nn.Sequential]) -> Callable[[], nn.Sequential]:
        def made() -> nn.Sequential:
            net = make_net()
            net.register_forward_pre_hook(self._see)
            self.networks.append(net)
            return net

        return made

    def _see(self, net: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not net.training:
            return
        if not self.batches:
            self.before = {name: t.detach().clone() for name, t in net.state_dict().items()}
        self.batches.append(inputs[0].detach().clone())


def run(title: str, folder: Path, change: Callable[[str], str] = str) -> tuple[Namespace, Recorder]:
    """Run a section in a folder of its own."""
    torch.manual_seed(0)
    namespace: Namespace = {"__name__": "frameworks"}
    exec(sections()[""], namespace)
    recorder = Recorder()
    namespace["make_net"] = recorder.watch(namespace["make_net"])
    previous = Path.cwd()
    os.chdir(folder)
    try:
        exec(compile(change(sections()[title]), f"{PAGE} ({title})", "exec"), namespace)
    finally:
        os.chdir(previous)
    return namespace, recorder


def by_hand(
    recorder: Recorder, namespace: Namespace, stop_at: int, lrs: Callable[[int], float], accumulate: int = 1
) -> tuple[nn.Sequential, int]:
    """Masked SGD by PyTorch's for-loop over the same batches, and the number of its steps."""
    labels = {tuple(x.tolist()): y for x, y in namespace["examples"]}
    scope: Namespace = {}
    exec(sections()[""], scope)  # its make_net is not watched
    net = scope["make_net"]()
    masks = sk.sparsify(net, 0.9)
    net.load_state_dict(recorder.before)
    dst = sk.RigL(masks, update_every=2, stop_at=stop_at)
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, foreach=False)
    steps = 0
    for i, x in enumerate(recorder.batches):
        y = torch.stack([labels[tuple(row.tolist())] for row in x])
        (scope["loss_fn"](net(x), y) / accumulate).backward()
        if (i + 1) % accumulate:
            continue
        dst.step()
        opt.param_groups[0]["lr"] = lrs(steps)
        with torch.no_grad():  # what the new masks drop and grow starts at zero
            for p, mask in masks.items():
                p.mul_(mask)
                if opt.state[p]:
                    opt.state[p]["momentum_buffer"].mul_(mask)
                if p.grad is not None:
                    p.grad.mul_(mask)
        if not dst.skip_next:
            opt.step()
        opt.zero_grad()
        steps += 1
    return net, steps


def assert_equal(found: nn.Module, expected: nn.Module) -> None:
    for name, tensor in expected.state_dict().items():
        own = found.state_dict()[name]
        if tensor.dtype == torch.bool:
            assert torch.equal(own, tensor), name
        else:
            torch.testing.assert_close(own, tensor, rtol=1e-4, atol=1e-6)


def assert_trained(recorder: Recorder) -> None:
    """The masks have changed, with as many active weights, and all weights outside them are zero."""
    (net,) = recorder.networks
    for name, p in sk.Masks(net).named().items():
        mask, before = sk.Masks(net)[p], recorder.before[f"{name}_mask"]
        assert not torch.equal(mask, before)
        assert int(mask.sum()) == int(before.sum())
        assert not p[~mask].any()
        assert not torch.equal(p, recorder.before[name])


@pytest.fixture
def _no_process_group() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class TestFSDP2:
    @pytest.mark.usefixtures("_no_process_group")
    def test_it_trains_as_one_process(self, tmp_path: Path) -> None:
        code = sections()[""] + sections()["FSDP2"]
        assert "\nfully_shard(model)\n" in code
        store = f"file://{tmp_path}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        sharded: Namespace = {}
        whole: Namespace = {}
        for own, snippet in ((sharded, code), (whole, code.replace("\nfully_shard(model)\n", "\n"))):
            torch.manual_seed(0)
            exec(compile(snippet, f"{PAGE} (FSDP2)", "exec"), own)
        states = sharded["model"].state_dict(), whole["model"].state_dict()
        for name, tensor in states[1].items():
            own = states[0][name]
            assert torch.equal(own.full_tensor() if hasattr(own, "full_tensor") else own, tensor), name
        assert sharded["dst"].last_update == whole["dst"].last_update != {}


class TestDistributedDataParallel:
    TITLE = "DistributedDataParallel"

    @pytest.mark.usefixtures("_no_process_group")
    def test_it_trains_as_masked_sgd_by_hand(self, tmp_path: Path) -> None:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
        )
        namespace, recorder = run(self.TITLE, tmp_path, masked_sgd)
        net, steps = by_hand(recorder, namespace, 6, lambda _: 0.1)
        assert steps == 8
        assert_equal(recorder.networks[0], net)
        assert_trained(recorder)

    @pytest.mark.slow
    def test_the_order_of_wrapping_does_not_matter(self, tmp_path: Path) -> None:
        code = sections()[""] + sections()[self.TITLE]
        sparsified = "masks = sk.sparsify(model, sparsity=0.9)\n"
        wrapped = "ddp = DistributedDataParallel(model)\n"
        assert sparsified + wrapped in code
        swapped = code.replace(sparsified + wrapped, wrapped + sparsified.replace("model", "ddp"))
        states = [
            state
            for i, snippet in enumerate((code, swapped))
            for state in self.on_two_ranks(snippet, tmp_path / str(i))
        ]
        # Running statistics are a rank's own until the next forward.
        trained = [name for name in states[0] if "running" not in name]
        for state in states[1:]:
            assert all(torch.equal(state[name], states[0][name]) for name in trained)

    def on_two_ranks(self, code: str, folder: Path) -> list[dict[str, Tensor]]:
        """What each rank has in the end. Each has half of the examples."""
        folder.mkdir()
        script = folder / "driver.py"
        script.write_text(
            "import torch\ntorch.manual_seed(0)\ntorch.set_num_threads(1)\n"
            "torch.distributed.init_process_group('gloo')\nrank = torch.distributed.get_rank()\n"
            + code.replace("DataLoader(examples,", "DataLoader(examples[rank::2],")
            + f"\ntorch.save(model.state_dict(), f'{folder}/{{rank}}.pt')\n"
            "torch.distributed.destroy_process_group()\n"
        )
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        subprocess.run(
            [sys.executable, *launcher, str(script)],
            check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            timeout=300,
        )
        return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


class TestHuggingFace:
    TITLE = "Hugging Face Trainer"

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("transformers", reason="transformers is not installed")
        pytest.importorskip("accelerate", reason="accelerate is not installed: Trainer needs it")

    def test_it_trains_as_masked_sgd_by_hand(self, tmp_path: Path) -> None:
        namespace, recorder = run(self.TITLE, tmp_path, masked_sgd)
        # Trainer's schedule: linear to zero.
        net, steps = by_hand(recorder, namespace, 12, lambda step: 0.1 * (1 - step / 16))
        assert steps == 16
        assert_equal(recorder.networks[0], net)
        assert_trained(recorder)

    def test_a_resumed_run_ends_as_the_whole_one(self, tmp_path: Path) -> None:
        whole, first = run(self.TITLE, tmp_path)
        code = sections()[self.TITLE].replace("trainer.train()", "")
        again, second = run(
            self.TITLE,
            tmp_path,
            lambda _: code + "\ntrainer.train(resume_from_checkpoint='runs/checkpoint-8')\n",
        )
        assert len(second.batches) == 8
        assert_equal(second.networks[0], first.networks[0])
        assert again["dst"].state_dict()["step"] == 16
        assert again["dst"].exploration_rate() == whole["dst"].exploration_rate()


class TestLightning:
    TITLE = "Lightning"

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("lightning", reason="lightning is not installed")

    def test_it_trains_as_masked_sgd_by_hand(self, tmp_path: Path) -> None:
        namespace, recorder = run(self.TITLE, tmp_path, masked_sgd)
        net, steps = by_hand(recorder, namespace, 12, lambda _: 0.1)
        assert steps == 16
        assert_equal(recorder.networks[0], net)
        assert_trained(recorder)

    def test_a_resumed_run_ends_as_the_whole_one(self, tmp_path: Path) -> None:
        whole, first = run(self.TITLE, tmp_path)
        half = tmp_path / "half"
        half.mkdir()
        code = sections()[self.TITLE]
        run(self.TITLE, half, lambda _: code.replace("max_epochs=2", "max_epochs=1"))
        (checkpoint,) = half.glob("runs/**/*.ckpt")
        resumed = code.replace("fit(module, loader)", f"fit(module, loader, ckpt_path={str(checkpoint)!r})")
        again, second = run(self.TITLE, half, lambda _: resumed)
        assert len(second.batches) == 8
        assert_equal(second.networks[0], first.networks[0])
        assert again["module"].dst.exploration_rate() == whole["module"].dst.exploration_rate()

    def test_load_from_checkpoint_finds_the_masks(self, tmp_path: Path) -> None:
        namespace, recorder = run(self.TITLE, tmp_path)
        (checkpoint,) = tmp_path.glob("runs/**/*.ckpt")
        loaded = namespace["Classifier"].load_from_checkpoint(checkpoint)
        assert_equal(loaded.net, recorder.networks[0])
        assert loaded.dst.state_dict()["step"] == 16


class TestAccelerate:
    TITLE = "Accelerate"

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("accelerate", reason="accelerate is not installed")

    def test_it_trains_as_masked_sgd_by_hand(self, tmp_path: Path) -> None:
        namespace, recorder = run(self.TITLE, tmp_path, masked_sgd)
        net, steps = by_hand(recorder, namespace, 6, lambda _: 0.1, accumulate=2)
        assert steps == 8
        assert_equal(recorder.networks[0], net)
        assert_trained(recorder)

    def test_the_state_comes_back(self, tmp_path: Path) -> None:
        namespace, recorder = run(self.TITLE, tmp_path)
        net, dst, opt = recorder.networks[0], namespace["dst"], namespace["opt"]
        before = {name: t.clone() for name, t in net.state_dict().items()}
        rate = dst.exploration_rate()
        momentum = [s["momentum_buffer"].clone() for s in opt.state.values()]
        with torch.no_grad():
            net[0].weight_mask.fill_(True)
            net[0].weight.fill_(1.0)
        dst.load_state_dict({**dst.state_dict(), "step": 0})
        namespace["accelerator"].load_state(tmp_path / "checkpoint")
        assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())
        assert dst.state_dict()["step"] == 8
        assert dst.exploration_rate() == rate
        for state, expected in zip(opt.state.values(), momentum, strict=True):
            assert torch.equal(state["momentum_buffer"], expected)


def test_a_checkpoint_without_the_state_of_the_topology_starts_its_clock_again() -> None:
    """As the page says: the masks are there, the number of steps is not."""
    scope: Namespace = {}
    exec(sections()[""], scope)
    nets = [scope["make_net"]() for _ in range(2)]
    masks = [sk.sparsify(net, 0.9) for net in nets]
    former, anew = (sk.SET(own, update_every=2, stop_at=6) for own in masks)
    for _ in range(6):
        former.step()
    nets[1].load_state_dict(nets[0].state_dict())
    assert torch.equal(nets[1][0].weight_mask, nets[0][0].weight_mask)
    former.step()
    former.step()
    assert not former.updated
    anew.step()
    anew.step()
    assert anew.updated
