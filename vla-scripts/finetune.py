"""Fine-tune a vision-language-action policy, plain or under the CRaFT constraint.

python vla-scripts/finetune.py --help

The program is prismatic/programs/finetune.py, installed as `craft-finetune`; there is the way to the line where the
gradients meet.
"""

from prismatic.programs.finetune import main

if __name__ == "__main__":
    main()
