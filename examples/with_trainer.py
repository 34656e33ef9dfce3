"""Train a sparse network with Hugging Face's Trainer (``pip install transformers accelerate``):
``python examples/with_trainer.py``. Started again, it goes on where it was.
"""

from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import sparseopt_kernels as sk

EPOCHS = 10
FOLDER = Path("with_trainer")


def make_model() -> nn.Module:
    hidden = [nn.Linear(64, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU()]
    hidden += [nn.Linear(512, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(128, 10))


def data() -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Return 1,297 images of digits to train on, and 500 to test on."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    examples = [{"x": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    return examples[500:], examples[:500]


class Classifier(nn.Module):
    """A model as Trainer takes it: it returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Topology(TrainerCallback):
    """Updates the masks before each step of the optimizer, and saves and loads ``dst`` with the model."""

    def __init__(self, dst: sk.RigL) -> None:
        self.dst = dst

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.dst.step()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero:  # after all else: a checkpoint that has this file is complete
            file = self._file(args, state)
            torch.save(self.dst.state_dict(), file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step > 0:  # resumed
            self.dst.load_state_dict(torch.load(self._file(args, state)))

    def _file(self, args: TrainingArguments, state: TrainerState) -> Path:
        return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / "dst.pt"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def main() -> None:
    torch.manual_seed(0)
    train, test = data()
    args = TrainingArguments(
        str(FOLDER),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=500,
        lr_scheduler_type="cosine",
        max_grad_norm=0,  # SparseOpt clips: Trainer would count gradients of inactive weights
        save_strategy="epoch",
        save_total_limit=2,
        report_to="none",
    )
    steps = EPOCHS * -(-len(train) // (args.train_batch_size * args.world_size))
    classifier = Classifier()
    masks = sk.sparsify(classifier, sparsity=0.95, seed=0)
    opt = sk.SparseOpt(
        classifier.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, masks=masks, max_grad_norm=1.0
    )
    dst = sk.RigL(masks, update_every=25, stop_at=0.75 * steps)
    trainer = Trainer(
        classifier,
        args,
        train_dataset=train,
        callbacks=[Topology(dst)],
        optimizers=(opt, None),  # Trainer makes the schedule
    )
    complete = sorted((path.parent for path in FOLDER.glob("checkpoint-*/dst.pt")), key=step_of)
    trainer.train(resume_from_checkpoint=str(complete[-1]) if complete else None)
    found = trainer.predict(test)
    accuracy = (found.predictions.argmax(axis=1) == found.label_ids).mean()
    print(f"{masks}\ntest accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
