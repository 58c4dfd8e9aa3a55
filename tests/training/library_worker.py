"""Writes or reads checkpoints with the libraries of the interpreter that runs it; prints what they do, as JSON.

python library_worker.py write|read FOLDER
"""

import json
import sys
from pathlib import Path

import transformers
from published_fixtures import make_published_folder
from small_checkpoints import LORA, act, train
from transformers import AutoTokenizer

from prismatic.training.checkpoints import load_checkpoint
from prismatic.vla.prompts import build_prompt


def write(root: Path) -> None:
    start = train(root, "start", save_training_state=False)
    train(root, "lora", config_file_path=str(start), save_training_state=False, **LORA)
    merged = {"merge_lora_during_training": True, "config_file_path": str(start)}
    train(root, "merged", save_training_state=False, **LORA, **merged)
    make_published_folder(root / "published")


def read(folder: Path) -> dict:
    loaded, text = load_checkpoint(folder), build_prompt("open the drawer")
    library = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return {
        "actions": act(loaded.model).flatten().tolist(),
        "tokens": [loaded.processor.tokenizer(text)["input_ids"], library(text)["input_ids"]],
    }


if __name__ == "__main__":
    task, root = sys.argv[1], Path(sys.argv[2])
    if task == "write":
        write(root)
    folders = [path for path in sorted(root.iterdir()) if (path / "config.json").exists()]
    found = {folder.name: read(folder) for folder in folders}
    print(json.dumps({"version": transformers.__version__, "folders": found}))
