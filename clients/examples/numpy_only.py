"""Train from fastaa-loaderd without torch: softmax regression in plain numpy.

    fastaa-loaderd --config config/demo.toml &
    python clients/examples/numpy_only.py

With `output="numpy"` the client never imports torch. The same batches go into JAX by
`jnp.array(images)`, which copies them to its device.
"""

from __future__ import annotations

import argparse
import sys

import fastaa
import numpy as np
import numpy.typing as npt

LEARNING_RATE = 0.02


class Softmax:
    """A linear classifier of flattened images, trained by stochastic gradient descent."""

    def __init__(self, n_features: int, n_classes: int) -> None:
        self.weights = np.zeros((n_features, n_classes), dtype=np.float32)
        self.bias = np.zeros(n_classes, dtype=np.float32)

    def logits(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Scores, `[n, classes]`."""
        return images.reshape(len(images), -1) @ self.weights + self.bias

    def step(self, images: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> None:
        """One step down the gradient of the mean cross entropy."""
        logits = self.logits(images)
        gradient = np.exp(logits - logits.max(axis=1, keepdims=True))
        gradient /= gradient.sum(axis=1, keepdims=True)
        gradient[np.arange(len(labels)), labels] -= 1
        gradient *= LEARNING_RATE / len(labels)
        self.weights -= images.reshape(len(images), -1).T @ gradient
        self.bias -= gradient.sum(axis=0)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runtime-dir", help="the daemon's, if it is not the default one")
    parser.add_argument("--dataset", default="fashion-mnist", help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=128, help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error("--epochs must be at least 1")
    return arguments


def main() -> None:
    """Trains, evaluates, and says how it went."""
    arguments = parse_arguments()
    common = {"runtime_dir": arguments.runtime_dir, "output": "numpy"}
    with fastaa.Loader(arguments.dataset, batch_size=arguments.batch_size, **common) as loader:
        assert loader.n_classes is not None, "the labels are classes"
        model = Softmax(int(np.prod(loader.image_shape)), loader.n_classes)
        for _ in range(arguments.epochs):
            for images, labels in loader:
                model.step(images, labels)
        is_exact = loader.epoch_digest == loader.expected_digest(arguments.epochs - 1)
    with fastaa.Loader(
        arguments.dataset,
        split="test",
        batch_size=1000,
        shuffle=False,
        crop={"kind": "none"},
        hflip=False,
        policy="none",
        **common,
    ) as test:
        n_right = sum(
            int((model.logits(images).argmax(1) == labels).sum()) for images, labels in test
        )
        print(f"test accuracy: {100 * n_right / test.n_samples:.2f} %")
    print(f"every sample of the last epoch came exactly once: {'yes' if is_exact else 'no'}")


if __name__ == "__main__":
    try:
        main()
    except fastaa.Error as error:
        sys.exit(f"error: {error}")
