"""How each attempt at a demonstration begins."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.robot.libero.collect_settings import CollectSettings, standard_states


@dataclass(frozen=True)
class Start:
    """How an episode begins: seed of the placement and of the noise, row of the standard states (None: sampled)."""

    seed: int
    standard_state: int | None
    noise_std: float


def is_noisy(episode: int, fraction: float) -> bool:
    """Spread `fraction` of the episodes evenly over the episode numbers."""
    return int((episode + 1) * fraction) > int(episode * fraction)


def episode_start(settings: CollectSettings, task_id: int, episode: int, attempt: int) -> Start:
    """The start of one attempt; depends on nothing but the arguments, so that resumed runs agree with complete ones."""
    sequence = np.random.SeedSequence([settings.seed, task_id, episode, attempt])
    states = standard_states(settings.initial_states)
    standard = None if states is None else states[episode % len(states)]
    std = settings.noise_std if is_noisy(episode, settings.noise_fraction) else 0.0
    return Start(int(sequence.generate_state(1)[0]), standard, std)
