"""Train with PyTorch Lightning from fastaa-loaderd: the loaders go to `Trainer.fit` as they are.

    pip install 'lightning>=2.6'
    fastaa-loaderd --config config/demo.toml &
    python clients/examples/lightning_module.py
    python clients/examples/lightning_module.py --resume out/lightning/last.ckpt --epochs 4

No DataLoader and no LightningDataModule: Lightning saves `state_dict()` of the training loader in
each checkpoint and gives it to `load_state_dict()`, so that a run resumes at the exact sample, also
in the middle of an epoch.

For one process. Several ranks need the loss that ddp.py explains, and so `loader.batches()`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import fastaa
import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional


class Classifier(lightning.LightningModule):
    """A small CNN for images of any size."""

    def __init__(self, n_channels: int, n_classes: int) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(n_channels, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, n_classes),
        )

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """The loss of a batch."""
        images, labels = batch
        return functional.cross_entropy(self.model(images), labels)

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Adds a batch to the accuracy."""
        images, labels = batch
        is_right = self.model(images).argmax(1) == labels
        self.log("accuracy", is_right.float().mean(), batch_size=len(labels), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.03, momentum=0.9, nesterov=True)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runtime-dir", help="the daemon's, if it is not the default one")
    parser.add_argument("--dataset", default="fashion-mnist", help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=2, help="in all; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=128, help="default: %(default)s")
    parser.add_argument(
        "--checkpoint-dir", type=Path, default=Path("out/lightning"), help="default: %(default)s"
    )
    parser.add_argument(
        "--checkpoint-steps", type=int, default=100, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--resume", type=Path, metavar="FILE", help="checkpoint to go on from")
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error("--epochs must be at least 1")
    if arguments.resume is not None and not arguments.resume.is_file():
        parser.error(f"--resume: there is no file {arguments.resume}")
    return arguments


def main() -> None:
    """Trains, and says how it went."""
    arguments = parse_arguments()
    lightning.seed_everything(0, verbose=False)
    common = {"runtime_dir": arguments.runtime_dir, "seed": 0}
    train = fastaa.Loader(arguments.dataset, batch_size=arguments.batch_size, **common)
    validation = fastaa.Loader(
        arguments.dataset,
        split="test",
        batch_size=1000,
        shuffle=False,
        crop={"kind": "none"},
        hflip=False,
        policy="none",
        **common,
    )
    checkpoints = ModelCheckpoint(
        arguments.checkpoint_dir,
        filename="last",
        every_n_train_steps=arguments.checkpoint_steps,
        enable_version_counter=False,
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=arguments.epochs,
        # The sanity check would leave the validation loader in the middle of an epoch. After such a
        # break a loader goes on where it is: the first validation would miss the batches before.
        # For the same reason, don't set limit_val_batches.
        num_sanity_val_steps=0,
        callbacks=[checkpoints],
        logger=False,
        enable_progress_bar=sys.stderr.isatty(),
        enable_model_summary=False,
    )
    with train, validation:
        assert train.n_classes is not None, "the labels are classes"
        model = Classifier(train.image_shape[0], train.n_classes)
        trainer.fit(model, train, validation, ckpt_path=arguments.resume)
        if train.epoch_digest is None:
            sys.exit(f"error: {arguments.resume} leaves nothing to train; raise --epochs")
        is_exact = train.epoch_digest == train.expected_digest(arguments.epochs - 1)
    print(f"steps: {trainer.global_step}")
    print(f"test accuracy: {100 * trainer.callback_metrics['accuracy'].item():.2f} %")
    print(f"every sample of the last epoch came exactly once: {'yes' if is_exact else 'no'}")


if __name__ == "__main__":
    try:
        main()
    except fastaa.Error as error:
        sys.exit(f"error: {error}")
