"""Shared fixtures: where the golden numbers are, one thread per process, small training runs."""

import ctypes
import gc
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# No test is judged by how long it takes: the machine may be busy.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

GOLDEN = Path(os.environ.get("CRAFT_GOLDEN_DIR", Path(__file__).parent / "golden"))


@pytest.fixture(autouse=True, scope="module")
def few_objects_to_collect():
    """Every run ends with a garbage collection, which would go through all modules and all tests: half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of reference numbers (environment variable CRAFT_GOLDEN_DIR, default tests/golden)."""
    return GOLDEN


@pytest.fixture(scope="session")
def llama_tokenizer():
    """Built like Llama-2's: BOS and byte tokens, words with their space in front, a PAD token. Another vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(parts)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    core.train_from_iterator(["In: What action should the robot take to pick up the black bowl? Out: "] * 3, trainer)
    core.add_special_tokens([AddedToken("<PAD>")])
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<PAD>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=2048, **roles)


@pytest.fixture
def held_elsewhere():
    """Context: another process is the writer of a folder; yields it."""
    program = """
import sys
from pathlib import Path
from prismatic.output_folder import hold
hold(Path(sys.argv[1]), "")
print("held", flush=True)
input()
"""

    @contextmanager
    def holding(folder: Path):
        words = [sys.executable, "-c", program, str(folder)]
        root = Path(__file__).parents[1]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root) as other:
            assert other.stdout.readline() == b"held\n"
            try:
                yield other
            finally:
                other.kill()

    return holding


@pytest.fixture
def odd_folder(tmp_path, monkeypatch):
    """The relative path of a folder whose name means something to shells, patterns, URLs and formats."""
    folder = Path("a:b it's \"odd\" 'n' $HOME `id` [x]* 100% \U0001f916 \u0645 #1; x?y&z")
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def dead_process():
    """Number of a process that lives no more."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


@pytest.fixture
def homeless(monkeypatch):
    """This user has no home, as those of containers may have none."""

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)


@pytest.fixture
def run_unprivileged():
    """Run Python code (its text and words) in a process that has no right to ignore the mode of files, as root has."""

    def give_up() -> None:  # in the child; without effect when there is nothing to give up
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP

    def run(code: str, *words: str, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, "-W", "ignore", "-c", code, *words]
        options = {"cwd": Path(__file__).parents[1], "capture_output": True, "text": True} | options
        return subprocess.run(command, preexec_fn=give_up, check=False, **options)

    if sys.platform != "linux":
        pytest.skip("capabilities are Linux's")
    libc = ctypes.CDLL(None)
    return run


@pytest.fixture
def make_trainer(tmp_path):
    """Factory of trainers of the tiny preset on the small RLDS data set: make_trainer(name, **flags)."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from prismatic.training.config import FinetuneConfig
    from prismatic.training.loop import Trainer, seed_everything
    from prismatic.training.setup import build_setup

    def make(name: str, **flags):
        defaults = {
            "config_file_path": "tiny",
            "data_root_dir": str(Path(__file__).parent / "golden" / "rlds_mini"),
            "dataset_name": "libero_mini_no_noops",
            "run_root_dir": str(tmp_path / "runs"),
            "run_id_override": name,
            "batch_size": 2,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "wandb_log_freq": 1,
            "device": "cpu",
        }
        if flags.get("use_craft") or flags.get("retention_method") in ("craft", "feature_penalty"):
            defaults["craft_log_freq"] = 1
        cfg = FinetuneConfig(**(defaults | flags))
        seed_everything(cfg.seed)
        AcceleratorState._reset_state(reset_partial_state=True)  # it would keep the first run's precision
        return Trainer(cfg, build_setup(cfg), Accelerator(cpu=True, mixed_precision=cfg.precision(on_cuda=False)))

    return make
