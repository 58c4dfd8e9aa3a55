"""Fine-tune a vision-language-action policy, plain or under the CRaFT constraint.

python vla-scripts/finetune.py --config_file_path CHECKPOINT_OR_PRESET --dataset_name NAME --use_craft True
torchrun --standalone --nproc-per-node N vla-scripts/finetune.py ...

The way of a step: `run` (prismatic/training/run.py) builds a Trainer, its `fit` (loop.py) takes batches to
`optimizer_step` (step.py), and `CRaFTConstraint.combine_` (prismatic/craft/constraint.py) has one added to the other in
`RetentionGradient.add_to_action_gradients` (gradients.py).
"""

from prismatic.command_line import bad_input_in_one_line
from prismatic.training.command_line import parse_flags


def main() -> None:
    """Parse the flags and run."""
    with bad_input_in_one_line("finetune.py"):
        cfg = parse_flags()
    from prismatic.training.run import run  # loads torch, which help and mistakes can do without

    run(cfg)


if __name__ == "__main__":
    main()
