"""CartPole: evolve a policy of 58 parameters on episodes, with two Ray workers, until it balances the pole.

.venv/bin/pip install -e '.[examples]'
python examples/cartpole.py
"""

import time

import gymnasium
import torch
from torch import nn

import spartan_ray as sr

SOLVED = 475.0  # required mean return over 100 episodes; at most 500


class Return(sr.Fitness):
    """The return of an episode. A case is an episode's seed."""

    cases = 1_000_000

    def prepare(self, case_N):
        """Make environments for these seeds; all members of a generation use the same ones."""
        return gymnasium.make_vec("CartPole-v1", num_envs=len(case_N), vectorization_mode="sync"), case_N.tolist()

    def __call__(self, network, batch):
        environments, seeds = batch
        observation, _ = environments.reset(seed=seeds)
        return_N, alive_N = torch.zeros(len(seeds)), torch.ones(len(seeds), dtype=torch.bool)
        while alive_N.any():
            action_N = network(torch.from_numpy(observation)).argmax(1)
            observation, reward, ended, cut, _ = environments.step(action_N.numpy())
            return_N += torch.from_numpy(reward) * alive_N
            alive_N &= ~torch.from_numpy(ended | cut)
        return return_N


def main(workers=2):
    """Evolve the policy. Return its mean return over 100 new episodes."""
    torch.manual_seed(0)
    network, fitness = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), Return()
    strategy = sr.EvolutionStrategies(64, sigma=0.5, lr=0.5, shaping="centered-rank", mirrored=True)
    started = time.perf_counter()
    with sr.Population(network, fitness, fitness_cases=4, workers=workers) as population:
        for generation in range(1, 201):
            outcome = population.step(strategy)
            print(f"generation {generation}: return {outcome.after:.0f}", flush=True)
            if outcome.after >= SOLVED:
                with torch.inference_mode():
                    mean = float(fitness(network, fitness.prepare(torch.arange(1_000_000, 1_000_100))).mean())
                print(f"mean return {mean:.1f} over 100 new episodes, after {time.perf_counter() - started:.0f} s")
                if mean >= SOLVED:
                    return mean
    return 0.0


if __name__ == "__main__":
    main()
