"""Tests of gradient training and scoring against plain torch code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from local import make_spec, scored

from spartan_ray.engine.draws import permutation
from spartan_ray.engine.evaluator import ParentState
from spartan_ray.engine.flat import FlatModel
from spartan_ray.engine.moments import load_optimizer, optimizer_state
from spartan_ray.engine.strategies.requests import Members
from spartan_ray.noise.contract import noise
from spartan_ray.vision.classification import Normaliser, mean_gradient, score
from spartan_ray.vision.config import Data, Parent
from spartan_ray.vision.data import load_splits
from spartan_ray.vision.models import initial_model
from spartan_ray.vision.training import ORDER_OF_EPOCH, Trainer, shift_and_flip

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
    """The reference is v = momentum * v + (gradient + decay * w); w -= lr * v, on the batches of the documented order.

    Each step is compared from the same weights, because differences by rounding grow from step to step."""
    config = Parent(model="convnet", lr=0.05, momentum=0.8, weight_decay=0.01, batch_size=32)
    model, other = (FlatModel(initial_model(config, 10, 0)[0], CPU) for _ in range(2))
    trainer = Trainer(config, model, SPLITS.sgd[slice(0, 129)], NORMALISE, 0, augment=False)
    velocity_D = torch.zeros_like(model.theta_D)
    for epoch in (1, 2):
        batches = iter(torch.from_numpy(permutation(129, 0, ORDER_OF_EPOCH + epoch)).split(32))

        def check(count: int) -> None:
            index = next(batches)  # noqa: B023
            other.module.train().zero_grad()
            loss = F.cross_entropy(other.module(NORMALISE(SPLITS.sgd.pixels_NHWC[index])), SPLITS.sgd.labels_N[index])
            loss.backward()
            velocity_D.mul_(0.8).add_(other.gradient() + 0.01 * other.theta_D)
            error_D = model.theta_D - (other.theta_D - 0.05 * velocity_D)
            # A ReLU input may be so near 0 that rounding changes its sign, which is more than the rounding of sums.
            assert error_D.norm() < 0.01 * 0.05 * velocity_D.norm()
            other.theta_D.copy_(model.theta_D)

        trainer.train_epoch(epoch, check)
        assert len(list(batches)) == 1  # of one image, which is skipped


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
    images = SPLITS.sgd[slice(0, 601)]  # three passes, two of 200 images and one of 201
    with torch.no_grad():
        pixels = images.pixels_NHWC.permute(0, 3, 1, 2).double() / 255
        mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (SPLITS.mean_C, SPLITS.std_C))
        logits = network(((pixels - mean) / std).float())
    result = score(network, images, NORMALISE)
    assert abs(result.loss - F.cross_entropy(logits, images.labels_N).item()) < 1e-5
    first_N, second_N = logits.topk(2).values.T
    undecided = int((first_N - second_N < 1e-4).sum())  # float32 rounding of a network's sums is smaller
    hits = int((logits.argmax(1) == images.labels_N).sum())
    assert result.accuracy * 601 == pytest.approx(hits, abs=undecided + 1e-9)


def test_evaluator_leaves_parent_and_buffers_alone_and_scores_the_images_asked_for() -> None:
    parent = train(Parent(model="convnet"))
    theta_D = parent.theta_D.numpy().copy()
    image_N = np.array([3, 5, 70, 9])
    evaluator = make_spec(SPLITS).make(CPU)
    state = ParentState(theta_D.copy(), parent.buffers, {"fitness": image_N})
    state.theta_D.flags.writeable = False  # like Ray's shared memory
    evaluator.load(state)
    gain_K = np.array([0.1, 0.1, -0.1, 0], np.float32)
    members = Members(np.array([7, 8, 7, 1], np.uint64), np.zeros(4, np.float32), gain_K)
    scores, _ = evaluator.evaluate(members, "fitness", -math.inf)
    np.testing.assert_array_equal(scores.mean_KM, evaluator.evaluate(members, "fitness", -math.inf)[0].mean_KM)
    np.testing.assert_array_equal(state.theta_D, theta_D)
    for own, given in zip(evaluator.model.buffers, parent.buffers, strict=True):
        assert torch.equal(own, given)

    images = SPLITS.evolution[torch.from_numpy(image_N)]
    for k in (3, 0, 2):
        parent.theta_D.copy_(torch.from_numpy(theta_D + gain_K[k] * noise("uniform", 7, 0, len(theta_D))))
        expected = scored(parent.module, images, NORMALISE)
        assert (-scores.mean_KM[k, 0], scores.mean_KM[k, 1], scores.cases_K[k]) == expected


@pytest.mark.parametrize("eta", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("step", [0, 1, 400])
def test_gradient_noise_has_the_formula_s_variance(eta: float, step: int) -> None:
    """The variance of 24 thousand draws is eta / (1 + t)^0.55. Neighbouring draws do not correlate."""
    config = Parent(model="convnet", gradient_noise=eta, momentum=0.0, lr=1.0, batch_size=64)
    drawn = []
    for noise_of in (None, eta):
        model = FlatModel(initial_model(config, 10, 0)[0], CPU)
        quiet = config.model_copy(update={"gradient_noise": noise_of})
        trainer = Trainer(quiet, model, SPLITS.sgd[slice(0, 64)], NORMALISE, 0, augment=False)
        trainer.steps = step
        before_D = model.theta_D.clone()
        trainer.train_epoch(1, lambda count: None)
        assert trainer.steps == step + 1
        drawn.append(before_D - model.theta_D)
    noise_D = (drawn[1] - drawn[0]).double()
    assert len(noise_D) > 10_000
    assert abs(noise_D.var() / (eta / (1 + step) ** 0.55) - 1) < 0.03
    assert abs(noise_D.mean()) < 4 * float(noise_D.std()) / len(noise_D) ** 0.5
    assert abs(torch.corrcoef(torch.stack([noise_D[1:], noise_D[:-1]]))[0, 1]) < 0.03


def test_gradient_noise_differs_between_steps_and_seeds_and_repeats() -> None:
    ends = {}
    for name, seed, images in (("a", 0, 64), ("again", 0, 64), ("other", 1, 64)):
        config = Parent(model="convnet", gradient_noise=0.1, batch_size=32)
        model = FlatModel(initial_model(config, 10, 0)[0], CPU)
        Trainer(config, model, SPLITS.sgd[slice(0, images)], NORMALISE, seed, False).train_epoch(1, lambda count: None)
        ends[name] = model.theta_D.numpy().tobytes()
    assert ends["a"] == ends["again"] != ends["other"]


def test_the_gradient_is_torch_s_in_the_layout_of_theta() -> None:
    model = train(Parent(model="convnet"))
    images = SPLITS.sgd[slice(0, 300)]
    buffers = [buffer.clone() for buffer in model.buffers]
    model.module.zero_grad()
    mean_gradient(model.module, images, NORMALISE, "running")
    gradient_D = model.gradient()
    for own, old in zip(model.buffers, buffers, strict=True):
        assert torch.equal(own, old)
    other = FlatModel(initial_model(Parent(model="convnet"), 10, 5)[0], CPU)
    other.load_buffers(model.buffers)
    other.theta_D.copy_(model.theta_D)
    F.cross_entropy(other.module.eval()(NORMALISE(images.pixels_NHWC)), images.labels_N).backward()
    for view, parameter in zip(other.views(gradient_D), other.module.parameters(), strict=True):
        assert parameter.grad is not None
        assert (view - parameter.grad).norm() < 0.01 * parameter.grad.norm()
    # A step of length 0.001 against the gradient lowers the loss by its squared norm times `step`.
    before = score(model.module, images, NORMALISE).loss
    step = 1e-3 / float(gradient_D.norm())
    model.theta_D -= step * gradient_D
    expected = step * float(gradient_D.square().sum())
    assert abs((before - score(model.module, images, NORMALISE).loss) / expected - 1) < 0.05


def test_dead_taps_stay_and_live_ones_are_trained_with_all_that_belongs_to_a_gradient() -> None:
    """ResNet18 has both. The test uses gradient noise, rescales the moments of each tensor, and restores a state."""
    config = Parent(optimizer="adam", gradient_noise=0.01, batch_size=8, threads=1)
    images = SPLITS.sgd[slice(0, 24)]
    model = FlatModel(initial_model(config, 10, 0)[0], CPU)
    trainer = Trainer(config, model, images, NORMALISE, 0, augment=False)
    begun_D = model.theta_D.clone()
    trainer.train_epoch(1, lambda count: None)
    live_D = torch.zeros_like(begun_D)
    for part in trainer.leaves.parts(live_D):
        part += 1
    assert 4_200_000 < int(live_D.sum()) < 4_300_000
    moved_D = model.theta_D != begun_D
    assert not moved_D[live_D == 0].any()
    assert moved_D[live_D == 1].float().mean() > 0.999
    before_T = trainer.gradient_norms()
    moments = [trainer.optimizer.state[leaf]["exp_avg"].clone() for leaf in trainer.leaves.tensors]
    model.theta_D.mul_(1.1)
    trainer.rescale_moments(before_T)
    for leaf, moment, ratio in zip(trainer.leaves.tensors, moments, trainer.gradient_norms() / before_T, strict=True):
        torch.testing.assert_close(trainer.optimizer.state[leaf]["exp_avg"], moment * ratio, rtol=1e-4, atol=1e-9)

    other = FlatModel(initial_model(config, 10, 5)[0], CPU)
    resumed = Trainer(config, other, images, NORMALISE, 0, augment=False)
    other.module.load_state_dict(model.state_dict())
    tensors, rest = optimizer_state(trainer.optimizer)
    load_optimizer(resumed.optimizer, {name: tensor.clone() for name, tensor in tensors.items()}, rest)
    resumed.steps = trainer.steps
    for one in (trainer, resumed):
        one.train_epoch(2, lambda count: None)
    assert model.digest() == other.digest()


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_moments_are_rescaled_to_the_new_parent_s_gradient_or_forgotten(optimizer: str) -> None:
    """A classifier with ten times the weights has larger gradients. The moments of each tensor follow its gradient."""
    config = Parent(model="convnet", optimizer=optimizer, batch_size=32)  # type: ignore[arg-type]
    model = FlatModel(initial_model(config, 10, 0)[0], CPU)
    trainer = Trainer(config, model, SPLITS.sgd[slice(0, 300)], NORMALISE, 0, False)
    trainer.train_epoch(1, lambda count: None)
    parameters = list(model.module.parameters())
    names = ["momentum_buffer"] if optimizer == "sgd" else ["exp_avg", "exp_avg_sq"]
    old = [{name: trainer.optimizer.state[p][name].clone() for name in names} for p in parameters]
    before_T = trainer.gradient_norms()
    torch.testing.assert_close(before_T, trainer.gradient_norms())
    parameters[-2].data *= 10
    trainer.rescale_moments(before_T)
    ratio_T = trainer.gradient_norms() / before_T
    assert ratio_T.max() > 2 * ratio_T.min()
    for parameter, state, ratio in zip(parameters, old, ratio_T, strict=True):
        for name, power in (("momentum_buffer", 1), ("exp_avg", 1), ("exp_avg_sq", 2)):
            if name in state:
                torch.testing.assert_close(
                    trainer.optimizer.state[parameter][name], state[name] * float(ratio) ** power
                )
    trainer.reset_moments()
    assert not any(trainer.optimizer.state.values())
    trainer.train_epoch(2, lambda count: None)
    fresh = Trainer(config, model, SPLITS.sgd, NORMALISE, 0, False)
    assert fresh.optimizer.state_dict()["param_groups"] == trainer.optimizer.state_dict()["param_groups"]
