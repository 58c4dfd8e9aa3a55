"""Load a policy, ask it for a chunk of actions, and execute chunks: open loop, and with temporal ensembling.

    python examples/inference.py        # in the folder of the repository, as all examples

Prints what the policy takes and gives, how far its actions are from a demonstration's, and the file of a picture.
"""

# %% A demonstration of a task that the policy was trained on
import tempfile

import matplotlib.pyplot as plt
import numpy as np

import craft_vla
from prismatic.vla.datasets.inspect import open_folder
from prismatic.vla.images import frame_pixels

START, EPISODE = "pretrained_models/tiny-libero-object", 1
_, source, config = open_folder("datasets/rlds/libero_object_scripted_no_noops")
instruction = source.instructions[EPISODE]
actions, states = config.standardize(source.actions(EPISODE), source.state(EPISODE))  # (T, 7), (T, 8), as learned

# %% The policy, and one chunk
policy = craft_vla.load_policy(START)
print(policy)


def seen_at(step):
    """What a robot would measure: images (H, W, 3) uint8 by camera, and state (8,)."""
    return {camera: frame_pixels(source.frame(camera, EPISODE, step)) for camera in policy.cameras}, states[step]


chunk = policy.predict(*seen_at(0), instruction)
print(f"{instruction}: {len(chunk)} actions, the first is {np.round(chunk[0], 2)}")


# %% A whole episode, in two ways
def episode(policy):
    """What the policy does about what the demonstration saw, (T, 7)."""
    taken = []

    def observe():  # called when the policy needs to look
        return seen_at(len(taken)) if len(taken) < len(actions) else None

    for action in policy.run(observe, instruction):
        taken.append(action)  # a robot would move here
    return np.stack(taken[: len(actions)])


ways = {"open loop": episode(policy), "ensembling": episode(craft_vla.load_policy(START, ensemble=0.1))}
for name, taken in ways.items():
    print(f"{name}: {len(taken)} actions, {np.abs(taken - actions).mean():.3f} from the demonstration's on average")

# %% The motion, beside the demonstration's
figure, axes = plt.subplots(3, sharex=True, layout="constrained")
for axis, dimension, name in zip(axes, (0, 2, 6), ("x", "z", "gripper"), strict=True):
    axis.plot(np.stack([taken[:, dimension] for taken in (actions, *ways.values())], axis=1))
    axis.set_ylabel(name)
axes[0].legend(["demonstration", *ways])
figure.savefig(picture := f"{tempfile.mkdtemp()}/actions.png")
print(picture)
