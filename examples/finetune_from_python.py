"""Fine-tune a policy from Python: plainly, and so that it keeps what it could do.

    python examples/finetune_from_python.py     # in the folder of the repository, as all examples

Prints the log of two short trainings, how far each moved the actions of an old task, and where model card and picture
are. It shows the calls: 40 steps are too few to learn the new task or to meet the budget (README.md has what 800 do).
"""

# %% A plain fine-tuning, and one with the preset `keep`
import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import craft_vla
from prismatic.vla.datasets.inspect import open_folder
from prismatic.vla.images import frame_pixels

START, OLD, NEW = (
    "pretrained_models/tiny-libero-object",
    "libero_object_scripted_no_noops",
    "libero_spatial_scripted_no_noops",
)
BUDGET = 0.03
folder = tempfile.mkdtemp()
flags = {"config_file_path": START, "data_root_dir": "datasets/rlds", "dataset_name": NEW, "run_root_dir": folder}
flags |= {"batch_size": 8, "learning_rate": 2e-4, "lr_schedule": "cosine", "max_steps": 40, "craft_log_freq": 4}
keep = {"use_craft": True, "craft_preset": "keep", "craft_retention_budget": BUDGET}
keep |= {"craft_memory_data": f"datasets/rlds/{OLD}"}  # observations of old tasks; without them: their sentences alone
plain = craft_vla.finetune(**flags, run_id_override="plain")
kept = craft_vla.finetune(**flags, **keep, run_id_override="kept")
print(f"{kept}/README.md")  # the model card, with the verdict

# %% Drift against the budget: metrics.jsonl of the run
lines = [json.loads(line) for line in Path(folder, "kept", "metrics.jsonl").read_text().splitlines()]
plt.figure()
plt.plot([line["step"] for line in lines], [line["CRaFT/Retention Loss"] for line in lines], label="drift")
plt.axhline(BUDGET, linestyle="--", color="black", label="budget")
plt.xlabel("step")
plt.ylabel("change of the normalised actions")
plt.legend()
plt.savefig(f"{folder}/drift.png")
print(f"{folder}/drift.png")

# %% An old task: the same frames shown to all three policies, as a batch
_, source, config = open_folder(f"datasets/rlds/{OLD}")
actions, states = config.standardize(source.actions(0), source.state(0))
steps = range(0, len(actions) - 8, 4)
images = {camera: [frame_pixels(source.frame(camera, 0, step)) for step in steps] for camera in source.keys.cameras}
chunks = {}
for name, place in {"start": START, "plain": plain, "kept": kept}.items():
    policy = craft_vla.load_policy(place, unnorm_key=OLD)  # the old task's statistics
    chunks[name] = policy.predict(images, states[steps], [source.instructions[0]] * len(steps))
    moved = np.abs(chunks[name] - chunks["start"]).mean()
    error = np.abs(chunks[name] - [actions[step : step + 8] for step in steps]).mean()
    print(f"{name}: actions moved by {moved:.3f}, error {error:.3f}")
