"""Collect scripted LIBERO demonstrations into a data set with the layout of the published ones.

    python -m experiments.robot.libero.collect_demos --task_suite_name libero_object --task_ids 0,3,7,9 \
        --episodes_per_task 40 --output_dir data --dataset_name libero_object_scripted_no_noops

By default every episode starts from a placement *sampled* from the task's regions, so that the 50 standard initial
states used by the evaluation stay unseen.  Only successful episodes are kept.  Every episode is saved as soon as it is
finished (`<output_dir>/.scratch/<dataset_name>/`); starting the same command again continues where it stopped.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.robot.libero.action_noise import NoiseProcess
from experiments.robot.libero.eval_config import task_numbers
from experiments.robot.libero.expert import Command, ExpertFailedError, UnsupportedGoalError, expert_commands, is_noop
from experiments.robot.libero.expert_settings import describe_expert
from experiments.robot.libero.init_noise import InitNoiseError, displace_objects
from experiments.robot.libero.kernels import fixed_kernels, kernels_for_children
from experiments.robot.libero.modes import RenderMode, ResetMode
from experiments.robot.libero.simulator import LiberoEnv, require, simulator_versions
from experiments.robot.libero.surroundings import SimulatorUnavailableError
from experiments.robot.libero.tasks import LiberoTask, load_task, max_episode_steps, task_count
from prismatic.command_line import (
    MISTAKES,
    UsageError,
    bad_input_in_one_line,
    check_values,
    faults_in_one_line,
    flag,
    parse,
)
from prismatic.evidence.files import replacing, write_json
from prismatic.output_folder import check_folder, held
from prismatic.vla.datasets.rlds import Episode, write_rlds
from prismatic.vla.images import encode_jpeg

REPORT_FILE = "collection_report.json"
VERSION = "1.0.0"
MEGABYTE = 1_000_000
MAX_SETTLING_SHIFT = 0.02  # metres


class CollectionError(RuntimeError):
    """A collecting process died, or a task yielded no episode."""


@dataclass(frozen=True)
class CollectSettings:
    """One collection run.  Everything that decides the content of an episode is part of the scratch fingerprint."""

    task_suite_name: str
    task_ids: tuple[int, ...]
    output_dir: str
    dataset_name: str
    episodes_per_task: int = flag(40, at_least=1)
    image_size: int = flag(96, "pixels, square", at_least=16, at_most=4096)
    jpeg_quality: int = flag(95, at_least=1, at_most=100)
    num_workers: int = flag(2, "simulator processes", at_least=1, at_most=1024)
    seed: int = flag(0, at_least=0)
    noise_std: float = flag(0.0, "of the executed arm action; the recorded one stays clean", at_least=0, at_most=10)
    noise_fraction: float = flag(0.5, "share of episodes with noise (if noise_std > 0)", at_least=0, at_most=1)
    initial_states: str = flag("sampled", "'sampled' or 'standard:FIRST-LAST'")
    # LIBERO's own starts differ by so little that a policy succeeds by heart; from displaced ones it has to look.
    init_noise_mm: float = flag(
        0.0, "radius of the disc in which every object is displaced from its start", at_least=0, at_most=1000
    )
    render_mode: RenderMode = RenderMode.LAZY
    # Soft resets are faster but leave fixtures where they were built: a sampled object that belongs on one would fall.
    reset_mode: ResetMode = ResetMode.HARD
    max_attempts: int = flag(4, "per episode", at_least=1)
    # LIBERO's own demonstrations end after the goal has held for 10 steps. Without them hardly any window shows what
    # to do once the gripper has opened, and a policy trained on those carries the object and never lets go.
    steps_after_success: int = flag(10, "recorded after the goal is reached; it must still hold", at_least=0)

    def __post_init__(self) -> None:
        check_values(self)
        if not re.fullmatch(r"[A-Za-z0-9_]{1,200}", self.dataset_name):
            raise UsageError(f"--dataset_name: letters, digits and underscores only, found {self.dataset_name!r}")
        standard_states(self.initial_states)

    @property
    def scratch(self) -> Path:
        """Directory of finished episodes."""
        return Path(self.output_dir) / ".scratch" / self.dataset_name

    @property
    def target(self) -> Path:
        """Version directory of the finished data set."""
        return Path(self.output_dir) / self.dataset_name / VERSION

    def fingerprint(self) -> dict[str, Any]:
        """What two runs must share to continue each other (not the number of episodes, tasks or workers)."""
        modes = {"render_mode": self.render_mode.value, "reset_mode": self.reset_mode.value}
        kernels = (fixed_kernels() | os.environ).get("OPENBLAS_CORETYPE", "")
        content = asdict(self) | modes | {"expert": describe_expert(), "kernels": kernels}
        for name in ("task_ids", "output_dir", "dataset_name", "episodes_per_task", "num_workers"):
            del content[name]
        return content


@dataclass(frozen=True)
class Start:
    """How an episode begins: seed of the placement and of the noise, row of the standard states (None: sampled)."""

    seed: int
    standard_state: int | None
    noise_std: float


@dataclass(frozen=True)
class Share:
    """Episodes of one task that one process collects: `offset`, `offset + stride`, ..."""

    task_id: int
    offset: int
    stride: int


def standard_states(text: str) -> range | None:
    """`sampled` -> None, `standard:0-29` -> range(0, 30).  Raises UsageError for anything else."""
    if text == "sampled":
        return None
    match = re.fullmatch(r"standard:([0-9]{1,9})-([0-9]{1,9})", text)
    if match is None or int(match[1]) > int(match[2]):
        raise UsageError(f"--initial_states: expected 'sampled' or 'standard:FIRST-LAST', found {text!r}")
    return range(int(match[1]), int(match[2]) + 1)


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


@dataclass(frozen=True)
class ExpertLimits:
    """Length of a demonstration: at most max_steps until the goal holds, then after_success more."""

    max_steps: int
    after_success: int


class EpisodeRecorder:
    """Collects the frames of one episode; images are compressed at once."""

    def __init__(self, jpeg_quality: int) -> None:
        self._quality = jpeg_quality
        self._rows: dict[str, list[Any]] = {k: [] for k in ("actions", "state", "joint_state", "image", "wrist_image")}

    def add(self, env: LiberoEnv, action: np.ndarray) -> None:
        """Record what the environment shows now and the clean action (7,) chosen for it."""
        seen = env.observe()
        rows = self._rows
        rows["image"].append(encode_jpeg(seen.image, self._quality))
        rows["wrist_image"].append(encode_jpeg(seen.wrist_image, self._quality))
        rows["state"].append(seen.state)
        rows["joint_state"].append(env.joint_state())
        rows["actions"].append(action)

    def __len__(self) -> int:
        return len(self._rows["actions"])

    def arrays(self) -> dict[str, np.ndarray]:
        """Arrays for an npz file: float32 (T, 7), (T, 8), (T, 7) and per camera the joined JPEG bytes and lengths."""
        found = {k: np.asarray(self._rows[k], dtype=np.float32) for k in ("actions", "state", "joint_state")}
        for camera in ("image", "wrist_image"):
            strings = self._rows[camera]
            found[camera] = np.frombuffer(b"".join(strings), dtype=np.uint8)
            found[camera + "_lengths"] = np.array([len(s) for s in strings], dtype=np.int64)
        return found


def run_expert(
    env: LiberoEnv, commands: Iterator[Command], noise: NoiseProcess | None, record: Any, limits: ExpertLimits
) -> bool:
    """Execute the expert until the goal has held for `limits.after_success` more steps, it gives up, or the step limit.

    record(env, action) is called before every executed action (None: nothing is recorded).  Idle actions are neither
    executed nor recorded.  Returns whether the goal was reached and holds at the end.
    """
    previous: float | None = None
    executed, last, success = 0, limits.max_steps, False
    try:
        for command in commands:
            if is_noop(command.action, previous):
                continue
            if executed == last:
                break
            if record is not None:
                record(env, command.action)
            previous = command.action[6]
            action = command.action if noise is None else noise.disturb(command.action, command.noise_scale)
            executed += 1
            holds = env.step(action)
            if holds and not success:
                last = executed + limits.after_success
            success = holds
    except ExpertFailedError:
        return False
    return success


def settles(env: LiberoEnv) -> bool:
    """Run the settling steps; whether the start is usable afterwards.

    Sampled placements occasionally overlap, and the objects then fly apart.  Such a start (an object moved sideways
    by more than 2 cm), and one that already fulfils the goal, is not used.
    """
    bodies = [env.sim.model.body_name2id(item.root_body) for item in env.domain.objects_dict.values()]
    before = np.array(env.sim.data.body_xpos[bodies][:, :2])
    env.settle()
    moved = np.linalg.norm(env.sim.data.body_xpos[bodies][:, :2] - before, axis=1)
    return bool(moved.max(initial=0.0) < MAX_SETTLING_SHIFT) and not env.check_success()


def collect_episode(env: LiberoEnv, settings: CollectSettings, start: Start) -> EpisodeRecorder | None:
    """One attempt: reset, displace, settle, run the expert.  Returns the record of a success, else None."""
    states = env.task.init_states
    env.reset(None if start.standard_state is None else states[start.standard_state], seed=start.seed)
    if settings.init_noise_mm > 0:
        try:
            displace_objects(env, settings.init_noise_mm, (start.seed, env.task.task_id, start.standard_state or 0))
        except InitNoiseError:
            return None
    if not settles(env):
        return None
    noise = NoiseProcess(start.noise_std, np.random.default_rng(start.seed)) if start.noise_std > 0 else None
    recorder = EpisodeRecorder(settings.jpeg_quality)
    limits = ExpertLimits(max_episode_steps(settings.task_suite_name), settings.steps_after_success)
    return recorder if run_expert(env, expert_commands(env), noise, recorder.add, limits) else None


def episode_path(scratch: Path, task_id: int, episode: int) -> Path:
    """Scratch file of one finished episode."""
    return scratch / f"task_{task_id:03d}" / f"episode_{episode:05d}.npz"


def collect_share(settings: CollectSettings, share: Share) -> None:
    """Collect the missing episodes of one share (runs in its own process)."""
    numbers = range(share.offset, settings.episodes_per_task, share.stride)
    missing = [n for n in numbers if not _is_settled(episode_path(settings.scratch, share.task_id, n))]
    if not missing:
        return
    task = load_task(settings.task_suite_name, share.task_id)
    env = LiberoEnv(task, settings.image_size, settings.render_mode, reset_mode=settings.reset_mode)
    for number in missing:
        if _is_orphan():
            return
        begun = time.monotonic()
        outcome = _collect_number(env, settings, number)
        print(f"{task.name} episode {number}: {outcome}, {time.monotonic() - begun:.1f} s", flush=True)
    env.close()


def _collect_number(env: LiberoEnv, settings: CollectSettings, number: int) -> str:
    path = episode_path(settings.scratch, env.task.task_id, number)
    for attempt in range(settings.max_attempts):
        start = episode_start(settings, env.task.task_id, number, attempt)
        try:
            recorder = collect_episode(env, settings, start)
        except UnsupportedGoalError as error:
            write_json(path.with_suffix(".failed.json"), {"attempts": 0, "reason": str(error)}, indent=None)
            return str(error)
        if recorder is not None:
            header = _episode_header(env.task, start, attempt + 1)
            _write_npz(path, recorder.arrays() | {"header": np.array(json.dumps(header))})
            return f"{len(recorder)} steps, attempt {attempt + 1}"
    write_json(path.with_suffix(".failed.json"), {"attempts": settings.max_attempts}, indent=None)
    return f"failed {settings.max_attempts} times"


def _episode_header(task: LiberoTask, start: Start, attempts: int) -> dict[str, Any]:
    return {
        "instruction": task.language,
        "file_path": f"{task.suite}/{task.name}/{start.seed}",
        "attempts": attempts,
        **asdict(start),
    }


def load_episode(path: Path, index: int) -> Episode:
    """Read a scratch file back.  Raises ValueError naming the file when it is incomplete."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
        header = json.loads(str(arrays["header"]))
        images = {camera: _split(arrays[camera], arrays[camera + "_lengths"]) for camera in ("image", "wrist_image")}
    except (KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"scratch episode {path} cannot be read: {error}; delete it and collect again") from error
    return Episode(
        index=index,
        instruction=header["instruction"],
        actions=arrays["actions"],
        state=arrays["state"],
        images=images,
        joint_state=arrays["joint_state"],
        file_path=header["file_path"],
    )


def finished_episodes(settings: CollectSettings) -> list[Path]:
    """Scratch files that belong to the run, ordered by task and number."""
    wanted = itertools.product(settings.task_ids, range(settings.episodes_per_task))
    paths = [episode_path(settings.scratch, task, number) for task, number in wanted]
    return [path for path in paths if path.is_file()]


def collection_report(settings: CollectSettings) -> dict[str, Any]:
    """Counts per task: episodes kept, attempts, first-attempt successes, steps, unsolved episodes."""
    return {str(task): _task_report(settings, task) for task in settings.task_ids}


def _task_report(settings: CollectSettings, task_id: int) -> dict[str, Any]:
    headers, lengths, sizes, failed = [], [], [], []
    for number in range(settings.episodes_per_task):
        path = episode_path(settings.scratch, task_id, number)
        if path.is_file():
            with np.load(path, allow_pickle=False) as stored:
                headers.append(json.loads(str(stored["header"])))
                lengths.append(len(stored["actions"]))
                sizes.append(stored["image"].size + stored["wrist_image"].size)
        elif path.with_suffix(".failed.json").is_file():
            failed.append(json.loads(path.with_suffix(".failed.json").read_text()))
    return {
        "episodes": len(headers),
        "unsolved": len(failed),
        "attempts": sum(h["attempts"] for h in headers) + sum(f["attempts"] for f in failed),
        "first_attempt_successes": sum(h["attempts"] == 1 for h in headers),
        "noisy_episodes": sum(h["noise_std"] > 0 for h in headers),
        "steps_min_median_max": [int(f(lengths)) for f in (min, np.median, max)] if lengths else None,
        "jpeg_megabytes": round(sum(sizes) / MEGABYTE, 3),
        "seeds": [h["seed"] for h in headers],
        "instruction": headers[0]["instruction"] if headers else None,
        "reasons": sorted({f["reason"] for f in failed if "reason" in f}),
    }


def run_shares(settings: CollectSettings) -> list[Share]:
    """Split the work so that `num_workers` processes are busy, one task per process."""
    parts = max(1, -(-settings.num_workers // len(settings.task_ids)))
    return [Share(task, part, parts) for task in settings.task_ids for part in range(parts)]


def collect(settings: CollectSettings) -> Path:
    """Collect everything that is missing, then write the data set.  Returns the version directory.

    Raises FileExistsError when the data set exists, ValueError when the scratch files come from other settings or a
    task or start is outside the suite, SimulatorUnavailableError, and CollectionError when a process died or a task has
    no episode at all.
    """
    if settings.target.exists():
        raise FileExistsError(f"--dataset_name {settings.dataset_name}: {settings.target} exists already")
    _check_task_ids(settings)
    require(render=True)
    with held(settings.scratch, "--output_dir"):
        _check_fingerprint(settings)
        _run_processes(settings)
        return _finish(settings)


def _finish(settings: CollectSettings) -> Path:
    """Write the report and the data set from the scratch episodes."""
    report = collection_report(settings)
    write_json(settings.scratch / REPORT_FILE, report)
    empty = [task for task, counts in report.items() if not counts["episodes"]]
    if empty:
        raise CollectionError(f"no episode of task {', '.join(empty)}; see {settings.scratch / REPORT_FILE}")
    metadata = settings.fingerprint() | {"versions": simulator_versions(), "tasks": report}
    episodes = (load_episode(path, index) for index, path in enumerate(finished_episodes(settings)))
    shape = (settings.image_size, settings.image_size, 3)
    written = write_rlds(settings.target, settings.dataset_name, episodes, image_shape=shape, metadata=metadata)
    write_json(written.parent / REPORT_FILE, report)
    return written


def _check_task_ids(settings: CollectSettings) -> None:
    count = task_count(settings.task_suite_name)
    wrong = [task for task in settings.task_ids if not 0 <= task < count]
    if wrong or not settings.task_ids:
        raise UsageError(f"--task_ids: {settings.task_suite_name} has tasks 0..{count - 1}, found {settings.task_ids}")
    states = standard_states(settings.initial_states)
    for task in settings.task_ids if states is not None else ():
        found = len(load_task(settings.task_suite_name, task).init_states)
        if states[-1] >= found:
            raise UsageError(
                f"--initial_states {settings.initial_states}: task {task} has {found} standard states (0..{found - 1})"
            )


def _check_fingerprint(settings: CollectSettings) -> None:
    path = settings.scratch / "settings.json"
    wanted = json.loads(json.dumps(settings.fingerprint()))
    if not path.is_file():
        write_json(path, wanted)
        return
    found = json.loads(path.read_text())
    different = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
    if different:
        raise ValueError(
            f"{settings.scratch} holds episodes collected with other settings ({', '.join(different)}); "
            "use another dataset_name or delete the folder"
        )


def _run_processes(settings: CollectSettings) -> None:
    """Run all shares, `num_workers` at a time, each in a fresh process (memory is returned only by ending it)."""
    context = multiprocessing.get_context("spawn")
    waiting = run_shares(settings)
    running: list[tuple[Share, Any]] = []
    failures: list[str] = []
    while waiting or running:
        while waiting and len(running) < settings.num_workers:
            share = waiting.pop(0)
            process = context.Process(target=collect_share, args=(settings, share))
            with kernels_for_children():
                process.start()
            running.append((share, process))
        running[0][1].join(timeout=1.0)
        for share, process in [pair for pair in running if not pair[1].is_alive()]:
            running.remove((share, process))
            if process.exitcode != 0:
                failures.append(f"task {share.task_id} (exit code {process.exitcode})")
    if failures:
        raise CollectionError(f"collecting processes died: {'; '.join(failures)}; finished episodes are kept")


def _is_orphan() -> bool:
    """Whether the run that started this worker was killed; its lock is gone then, and another run may have begun."""
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()


def _is_settled(path: Path) -> bool:
    return path.is_file() or path.with_suffix(".failed.json").is_file()


def _split(joined: np.ndarray, lengths: np.ndarray) -> list[bytes]:
    ends = np.cumsum(lengths)
    if len(ends) == 0 or ends[-1] != joined.size:
        raise ValueError(f"image bytes: lengths sum to {lengths.sum()}, found {joined.size}")
    return [joined[end - length : end].tobytes() for end, length in zip(ends, lengths, strict=True)]


def _write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)


@dataclass(frozen=True)
class CollectFlags(CollectSettings):
    """The command line: settings whose tasks are still text."""

    task_suite_name: str = flag("", "LIBERO suite (required)")
    task_ids: str = flag("", "comma separated, or 'all' (required)")
    output_dir: str = flag("", "root that holds data sets (required)")
    dataset_name: str = flag("", "name of the data set (required)")

    def __post_init__(self) -> None:
        for name in ("task_suite_name", "task_ids", "output_dir", "dataset_name"):
            if not getattr(self, name):
                raise UsageError(f"--{name}: found none, expected one")
        super().__post_init__()
        check_folder(self.output_dir, "--output_dir")

    def settings(self) -> CollectSettings:
        """The settings. `all` asks the simulator for the number of tasks."""
        numbers = range(task_count(self.task_suite_name)) if self.task_ids == "all" else task_numbers(self.task_ids)
        return CollectSettings(**{**vars(self), "task_ids": tuple(numbers or ())})


def parse_arguments(argv: Sequence[str] | None = None) -> CollectSettings:
    """Command line -> settings.  Raises UsageError."""
    description = "Collect scripted LIBERO demonstrations as an RLDS data set."
    return parse(CollectFlags, argv, description=description).settings()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.  Returns 0; unusable input ends the process with one line and exit code 2, a fault with 1."""
    faults = faults_in_one_line("collect_demos.py", (CollectionError,))
    with faults, bad_input_in_one_line("collect_demos.py", (*MISTAKES, SimulatorUnavailableError)):
        settings = parse_arguments(argv)
        print(f"written: {collect(settings)}")
    for task, counts in collection_report(settings).items():
        kept = f"{counts['episodes']}/{settings.episodes_per_task}"
        print(f"task {task}: {kept} episodes, {counts['attempts']} attempts, steps {counts['steps_min_median_max']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
