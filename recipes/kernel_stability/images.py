"""Two image classifiers on the MNIST test images, and what is ranked at each of their checkpoints."""

import gzip
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from trl_dynamics.akg.task import Task, classifier

EPOCHS = (0, 1, 3, 5, 10, 20, 30)
NUM_TRAIN, NUM_HELD_OUT, BATCH, RATE, MOMENTUM, DECAY = 2000, 2000, 64, 2e-2, 0.9, 5e-4
# Of either side of the pairs, per class.
NUM_PER_CLASS = 2
Images = tuple[torch.Tensor, torch.Tensor]


class MLP(nn.Sequential):
    """784-50-30-10, tanh."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(784, 50), nn.Tanh(), nn.Linear(50, 30), nn.Tanh(), nn.Linear(30, 10))


class CNN(nn.Sequential):
    """The LeNet of the paper's classification experiment: two convolutions of width 5, three dense layers, tanh."""

    def __init__(self):
        convolutions = [nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh()]
        dense = [nn.Linear(400, 60), nn.Tanh(), nn.Linear(60, 42), nn.Tanh(), nn.Linear(42, 10)]
        super().__init__(*convolutions, nn.AvgPool2d(2), nn.Flatten(), *dense)


NETWORKS = {"mlp": MLP, "cnn": CNN}


def read_images(folder: Path, name: str = "t10k") -> Images:
    """(B, 1, 28, 28) in [0, 1] and (B,) of files in MNIST's format."""
    with gzip.open(folder / f"{name}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), dtype=np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(folder / f"{name}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), dtype=np.uint8, offset=8)
    return torch.from_numpy(pixels / np.float32(255)), torch.from_numpy(labels.astype(np.int64))


def drawn(seed: int) -> tuple[Images, Images]:
    """Training and held-out images of a seed, out of the 10,000."""
    pixels, labels = read_images(Path(os.environ["TRL_DYNAMICS_DATA"]) / "mnist")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    parts = order[:NUM_TRAIN], order[NUM_TRAIN : NUM_TRAIN + NUM_HELD_OUT]
    return tuple((pixels[part], labels[part]) for part in parts)


def of_every_class(images: Images, num: int) -> Images:
    """The first so many images of each class, class by class."""
    pixels, labels = images
    picked = torch.cat([(labels == digit).nonzero()[:num, 0] for digit in range(10)])
    return pixels[picked], labels[picked]


def checkpoints(name: str, seed: int, epochs: tuple[int, ...] = EPOCHS) -> Iterator[tuple[int, Task, float]]:
    """Train; at each of some epochs, 0 included: the epoch, the classifier, and its accuracy on held-out images."""
    torch.manual_seed(seed)
    (pixels, labels), (held_out, truth) = drawn(seed)
    model, order = NETWORKS[name](), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=MOMENTUM, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(epochs))
    for epoch in range(max(epochs) + 1):
        if epoch in epochs:
            with torch.no_grad():
                accuracy = float((model(held_out).argmax(dim=1) == truth).float().mean())
            yield epoch, classifier(model, head=model[-1]), accuracy
        for rows in torch.randperm(len(labels), generator=order).split(BATCH):
            nn.functional.cross_entropy(model(pixels[rows]), labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
