"""Gradient training and scoring, against torch written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from spartan_ray.config import Data, Parent
from spartan_ray.data import load_splits, permutation
from spartan_ray.evaluator import Evaluator, ParentState
from spartan_ray.fitness import Normaliser, score
from spartan_ray.model import FlatModel, initial_model
from spartan_ray.noise import noise
from spartan_ray.parent import ORDER_OF_EPOCH, Trainer, shift_and_flip
from spartan_ray.strategies import Members

CPU = torch.device("cpu")
SPLITS = load_splits(Data(name="digits"), 0)
NORMALISE = Normaliser(SPLITS.mean_C, SPLITS.std_C, CPU)


def train(config: Parent, epochs: int = 2, images: int = 129, augment: bool = False) -> FlatModel:
    model = FlatModel(initial_model(config, 10, 0)[0], CPU)
    trainer = Trainer(config, model, SPLITS.sgd[slice(0, images)], NORMALISE, 0, augment)
    for epoch in range(1, epochs + 1):
        trainer.train_epoch(epoch, lambda count: None)
    return model


def test_sgd_is_the_textbook_s() -> None:
    """v = momentum * v + (gradient + decay * w); w -= lr * v, on the batches of the documented order."""
    config = Parent(model="convnet", lr=0.05, momentum=0.8, weight_decay=0.01, batch_size=32)
    network = initial_model(config, 10, 0)[0].train()
    velocity = [torch.zeros_like(p) for p in network.parameters()]
    for epoch in (1, 2):
        order = torch.from_numpy(permutation(129, 0, ORDER_OF_EPOCH + epoch))
        for start in range(0, 128, 32):
            index = order[start : start + 32]
            loss = F.cross_entropy(network(NORMALISE(SPLITS.sgd.pixels_NHWC[index])), SPLITS.sgd.labels_N[index])
            gradients = torch.autograd.grad(loss, list(network.parameters()))
            with torch.no_grad():
                for p, v, g in zip(network.parameters(), velocity, gradients, strict=True):
                    v.mul_(0.8).add_(g + 0.01 * p)
                    p.sub_(0.05 * v)
    model = train(config)
    for ours, theirs in zip(model.module.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("config", [
    Parent(model="convnet"), Parent(model="convnet", optimizer="adam"), Parent(model="convnet", optimizer="adamw"),
    Parent(model="convnet", precision="bf16"), Parent(model="convnet", weight_decay=0.1),
])  # fmt: skip
def test_training_is_deterministic_and_learns(config: Parent) -> None:
    first, second = train(config, 4, 500), train(config, 4, 500)
    assert first.theta_D.numpy().tobytes() == second.theta_D.numpy().tobytes()
    untrained = FlatModel(initial_model(config, 10, 0)[0], CPU)
    assert score(first.module, SPLITS.sgd, NORMALISE).loss < score(untrained.module, SPLITS.sgd, NORMALISE).loss


def test_optimizers_and_augmentation_differ() -> None:
    thetas = [
        train(Parent(model="convnet")),
        train(Parent(model="convnet", optimizer="adam")),
        train(Parent(model="convnet", optimizer="adamw", weight_decay=0.1)),
        train(Parent(model="convnet", precision="bf16")),
        train(Parent(model="convnet"), augment=True),
    ]
    assert len({model.theta_D.numpy().tobytes() for model in thetas}) == len(thetas)


def test_augmentation_shifts_and_flips_each_image_by_itself() -> None:
    pixels = torch.zeros(200, 32, 32, 3, dtype=torch.uint8)
    pixels[:, 16, 10, 0] = torch.arange(1, 201, dtype=torch.uint8)
    moved = shift_and_flip(pixels, torch.Generator().manual_seed(0))
    number, row, column, colour = moved.nonzero(as_tuple=True)
    assert torch.equal(number, torch.arange(200))
    assert torch.equal(moved[number, row, column, colour], torch.arange(1, 201, dtype=torch.uint8))
    assert set((row - 16).tolist()) == set(range(-4, 5))
    flipped = column > 16
    assert 70 < int(flipped.sum()) < 130
    assert set((column[~flipped] - 10).tolist()) == set(range(-4, 5))
    assert set((column[flipped] - 21).tolist()) == set(range(-4, 5))


def test_score_is_torch_s_loss_and_accuracy_whatever_the_last_batch() -> None:
    network = train(Parent(model="convnet")).module.eval()
    images = SPLITS.sgd[slice(0, 600)]  # two full batches and a part of one
    with torch.no_grad():
        pixels = images.pixels_NHWC.permute(0, 3, 1, 2).double() / 255
        mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (SPLITS.mean_C, SPLITS.std_C))
        logits = network(((pixels - mean) / std).float())
    result = score(network, images, NORMALISE)
    assert abs(result.loss - F.cross_entropy(logits, images.labels_N).item()) < 1e-5
    assert result.accuracy == (logits.argmax(1) == images.labels_N).double().mean().item()


def test_evaluator_leaves_parent_and_buffers_alone_and_scores_the_images_asked_for() -> None:
    parent = train(Parent(model="convnet"))
    theta_D = parent.theta_D.numpy().copy()
    image_N = np.array([3, 5, 70, 9])
    evaluator = Evaluator(
        initial_model(Parent(model="convnet"), 10, 4)[0], SPLITS.evolution, NORMALISE, "uniform", "loss", CPU
    )
    state = ParentState(1, theta_D.copy(), [buffer.numpy() for buffer in parent.buffers], image_N)
    state.theta_D.flags.writeable = False  # as Ray's shared memory is
    evaluator.load(state)
    members = Members(np.array([7, 8, 7, 1], np.uint64), np.array([1, 1, -1, 0], np.int8), 0.1)
    fitness = evaluator.evaluate(members)
    np.testing.assert_array_equal(fitness, evaluator.evaluate(members))
    np.testing.assert_array_equal(state.theta_D, theta_D)
    for own, given in zip(evaluator.model.buffers, parent.buffers, strict=True):
        assert torch.equal(own, given)

    images = SPLITS.evolution[torch.from_numpy(image_N)]
    assert fitness[3] == -score(parent.module, images, NORMALISE).loss
    for k in (0, 2):
        parent.theta_D.copy_(
            torch.from_numpy(theta_D + np.float32(0.1) * members.sign_K[k] * noise("uniform", 7, 0, len(theta_D)))
        )
        assert fitness[k] == -score(parent.module, images, NORMALISE).loss
