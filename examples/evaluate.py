"""Evaluate a policy in LIBERO from Python, and compare two results episode by episode.

    python examples/evaluate.py     # in the folder of the repository, as all examples; 15 s on one core

Prints the log of two episodes, their success rate with its 95 % interval, and how they compare with the record of this
policy in results/. Two episodes say next to nothing, as the interval shows. Needs the extra `libero`; without a display
also MUJOCO_GL=osmesa, or egl, in the environment.
"""

# %% One task, two of its initial states
import tempfile

from experiments.robot.libero.compare_evals import compare_runs, run_line, verdict
from experiments.robot.libero.eval_config import EvalConfig
from experiments.robot.libero.evaluation import evaluate
from experiments.robot.libero.video import SaveVideos
from prismatic.evidence.episodes import read_run

folder = tempfile.mkdtemp()
config = EvalConfig(  # the flags of run_libero_eval.py
    pretrained_checkpoint="pretrained_models/tiny-libero-object",
    unnorm_key="libero_object_scripted_no_noops",
    task_suite_name="libero_object",
    task_ids="7",
    num_trials_per_task=2,
    initial_state_offset=30,
    save_videos=SaveVideos.NONE,
    results_dir=f"{folder}/policy",
    local_log_dir=folder,
)
results = evaluate(config)
overall = results["overall"]
low, high = overall["wilson_95"]
print(f"{overall['successes']} of {overall['trials']} episodes succeed; 95 % interval (Wilson) {low:.2f} to {high:.2f}")

# %% Two results, compared on the episodes that both have
recorded, mine = read_run("results/tiny_libero_object"), read_run(f"{folder}/policy")
print(f"A  {run_line(recorded)}\nB  {run_line(mine)}")
comparison = compare_runs(recorded, mine)
print(verdict(comparison))
