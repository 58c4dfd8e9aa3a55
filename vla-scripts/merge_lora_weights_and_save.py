"""Merge the adapters of a LoRA checkpoint into its base model, verify the result and save it.

python vla-scripts/merge_lora_weights_and_save.py --help

The program is prismatic/programs/merge_lora_weights_and_save.py, installed as `craft-merge`.
"""

from prismatic.programs.merge_lora_weights_and_save import MergeConfig, main, merge  # noqa: F401

if __name__ == "__main__":
    main()
