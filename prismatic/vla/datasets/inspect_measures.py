"""What `inspect` and every opening for training measure: numbers of all frames, images of some, JSON-ready."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np

from prismatic.progress import over
from prismatic.vla.datasets.registry import DataSetConfig, LiberoStandardization
from prismatic.vla.datasets.source import EpisodeSource
from prismatic.vla.images import decode_image

QUANTILES = {"min": 0.0, "q01": 0.01, "q50": 0.5, "q99": 0.99, "max": 1.0}
NOOP_NORM = 1e-4  # of the six motion dimensions, LIBERO's rule
_ROTATION = slice(3, 6)  # axis-angle in a LIBERO state
_FINGER_RANGE = 0.1  # metres; joints of LIBERO's gripper go to 0.04
_FEWEST_FRAMES, _CLEAR, _AGREEING = 5, 8.0, 0.8  # per command; standard errors; share of the episodes
_MAX_LISTED = 10
_MAX_DISTINCT = 16


def measure(source: EpisodeSource, config: DataSetConfig, max_images: int = 2000) -> dict:
    """Measure a data set.

    Args:
        source: the opened data set; without actions all that is about them is empty.
        config: its description; LIBERO's rules are used when it standardises as LIBERO does.
        max_images: decoded per camera, evenly spread over the frames; 0 decodes all.

    Returns:
        JSON-ready report without warnings. Quantities of dimensions without a finite value are None.
    """
    return interpret(measure_content(source, max_images), source, config)


def measure_content(source: EpisodeSource, max_images: int) -> dict:
    """The part of `measure` that does not depend on how the data set is described."""
    actions, states = _numbers(source)
    lengths = source.lengths
    return {
        "episodes": len(source),
        "frames": int(lengths.sum()),
        "episode_length": {
            "min": int(lengths.min()) if len(source) else 0,
            "median": float(np.median(lengths)) if len(source) else 0.0,
            "max": int(lengths.max(initial=0)),
        },
        "instructions": dict(Counter(source.instructions).most_common()),
        "recorded_hz": source.recorded_hz,
        "action": describe(actions),
        "state": describe(states),
        "gripper": histogram(actions),
        "noops": count_noops(actions),
        "rotation": describe_rotation(states),
        "duplicates": find_duplicates(actions or states, states),
        "cameras": {camera: measure_camera(source, camera, max_images) for camera in source.keys.cameras},
        "fingerprint": source.fingerprint,
    }


def interpret(content: dict, source: EpisodeSource, config: DataSetConfig) -> dict:
    """The report of `measure` from its first part."""
    standardize = config.standardize
    libero = isinstance(standardize, LiberoStandardization)
    report = content | {
        "chunk_len": config.action_spec.chunk_len,
        "short_episodes": np.flatnonzero(source.lengths < config.action_spec.chunk_len).tolist(),
        "control_hz": config.control_hz,
        "conventions": "libero" if libero else "own",
        "gripper_use": None,
    }
    if not isinstance(standardize, LiberoStandardization):
        return report | {"noops": None, "rotation": None}
    actions, states = _numbers(source)
    if actions:
        report["gripper_use"] = measure_gripper(actions, states, standardize.opens, standardize.closes)
    return report


def _numbers(source: EpisodeSource) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Actions, none where they are not read, and states of the episodes that have steps."""
    episodes = np.flatnonzero(source.lengths).tolist()
    actions = [source.actions(episode) for episode in episodes] if source.keys.action else []
    return actions, [source.state(episode) for episode in episodes]


def measure_gripper(
    actions: list[np.ndarray], states: list[np.ndarray], opens: float, closes: float
) -> dict[str, float | int | bool | None]:
    """How the last action dimension fits commands `opens` and `closes`.

    Returns {opens, closes, low, high: range of the values, opening, closing: frames nearer to one command than to the
    other, outside: share beyond both, others: share at neither, constant: one of the commands and nothing else,
    opens_when_high: whether the fingers (state 6 and 7, metres) are farther apart under the higher values, None when
    that is not clear, reversed: it contradicts the commands}.
    """
    values = np.concatenate([episode[:, -1] for episode in actions]).astype(np.float64)
    values = values[np.isfinite(values)]
    slack = 0.01 * abs(opens - closes)
    low, high = min(opens, closes), max(opens, closes)
    distance = np.abs(values - opens) - np.abs(values - closes)
    near = np.minimum(np.abs(values - opens), np.abs(values - closes)) <= slack
    found = {
        "opens": opens,
        "closes": closes,
        "low": float(values.min(initial=np.inf)) if values.size else None,
        "high": float(values.max(initial=-np.inf)) if values.size else None,
        "opening": int((distance < -slack).sum()),
        "closing": int((distance > slack).sum()),
        "outside": float(((values < low - slack) | (values > high + slack)).mean()) if values.size else 0.0,
        "others": float((~near).mean()) if values.size else 0.0,
        "constant": bool(values.size and near.all() and np.ptp(values) <= slack),
    }
    rises = _opens_when_high(actions, states)
    return found | {"opens_when_high": rises, "reversed": rises is not None and rises != (opens > closes)}


def _opens_when_high(actions: list[np.ndarray], states: list[np.ndarray]) -> bool | None:
    """Whether the fingers are farther apart under the higher half of the commands; None when it is not clear.

    How far apart they are, not how they move: whether a state is that before or after its action changes nothing.
    """
    if not states or states[0].shape[1] != 8 or actions[0].shape[1] != 7:
        return None
    fingers = [episode[:, 6:].astype(np.float64) for episode in states]
    if not all(np.abs(joints).max(initial=0) <= _FINGER_RANGE for joints in fingers):  # NaN is not either
        return None
    width = [joints[:, 0] - joints[:, 1] for joints in fingers]
    command = np.concatenate([episode[:, -1] for episode in actions]).astype(np.float64)
    high = command > (command.min(initial=np.inf) + command.max(initial=-np.inf)) / 2
    single = [
        _difference(*pair) for pair in zip(width, np.split(high, np.cumsum([len(w) for w in width[:-1]])), strict=True)
    ]
    differences = [difference for difference, error in filter(None, single)]
    both = _difference(np.concatenate(width), high)
    if both is None or not abs(both[0]) > _CLEAR * both[1]:
        return None
    agree = np.mean([np.sign(difference) == np.sign(both[0]) for difference in differences]) if differences else 0.0
    return bool(both[0] > 0) if agree >= _AGREEING else None


def _difference(width: np.ndarray, high: np.ndarray) -> tuple[float, float] | None:
    """Mean width under the higher commands minus that under the others, and its standard error."""
    above, below = width[high], width[~high]
    if min(len(above), len(below)) < _FEWEST_FRAMES:
        return None
    return float(above.mean() - below.mean()), float(np.sqrt(above.var() / len(above) + below.var() / len(below)))


def describe(episodes: list[np.ndarray]) -> dict:
    """Range, quantiles and constant dimensions of the finite values of [(T, D)], and where others are."""
    if not episodes:
        empty: dict = {"dimensions": 0, "constant": {}, "beyond_1": [], "not_finite": 0, "not_finite_at": []}
        return empty | {name: [] for name in QUANTILES}
    values = np.concatenate(episodes).astype(np.float64)
    columns = [column[np.isfinite(column)] for column in values.T]
    content: dict = {"dimensions": values.shape[1]}
    for name, q in QUANTILES.items():
        content[name] = [float(np.quantile(column, q)) if column.size else None for column in columns]
    content["beyond_1"] = [float(np.mean(np.abs(column) > 1 + 1e-3)) if column.size else 0.0 for column in columns]
    content["constant"] = {
        str(dim): float(column[0]) for dim, column in enumerate(columns) if column.size and np.ptp(column) == 0
    }
    places = [
        [number, *place]
        for number, episode in enumerate(episodes)
        for place in np.argwhere(~np.isfinite(episode)).tolist()
    ]
    return content | {"not_finite": len(places), "not_finite_at": places[:_MAX_LISTED]}


def histogram(actions: list[np.ndarray]) -> dict[str, int]:
    """{value of the last action dimension: frames}; ten bins when there are many values."""
    values = np.concatenate([episode[:, -1] for episode in actions]) if actions else np.empty(0)
    values = values[np.isfinite(values)].astype(np.float64)
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= _MAX_DISTINCT:
        return {f"{value:g}": int(count) for value, count in zip(distinct, counts, strict=True)}
    counts, edges = np.histogram(values, bins=10)
    names = (f"{low:g}..{high:g}" for low, high in zip(edges[:-1], edges[1:], strict=True))
    return {name: int(count) for name, count in zip(names, counts, strict=True)}


def find_noops(actions: np.ndarray) -> np.ndarray:
    """Which actions (T, 7) LIBERO's filter drops, (T,) bool.

    A step is dropped when the norm of the first six dimensions is below 1e-4 and the gripper command is that of the
    last kept step; before the first kept step the norm alone decides.
    """
    still = np.linalg.norm(actions[:, :6], axis=1) < NOOP_NORM
    # A dropped step has the gripper command of the last kept one, so the step before says it, once one was kept.
    same = np.concatenate([[True], actions[1:, -1] == actions[:-1, -1]])
    return still & (same | np.logical_and.accumulate(still))


def count_noops(actions: list[np.ndarray]) -> dict | None:
    """{count, share} of no-ops; None for actions that are not 7 wide."""
    if not actions or actions[0].shape[1] != 7:
        return None
    count = sum(int(find_noops(episode).sum()) for episode in actions)
    return {"count": count, "share": count / max(1, sum(map(len, actions)))}


def describe_rotation(states: list[np.ndarray]) -> dict | None:
    """Axis-angle vectors (state dimensions 3 to 5): range of their norm and largest change within one step, rad."""
    if not states or states[0].shape[1] != 8:
        return None
    rotations = [state[:, _ROTATION].astype(np.float64) for state in states]
    norms = np.concatenate([np.linalg.norm(rotation, axis=1) for rotation in rotations])
    norms = norms[np.isfinite(norms)]
    if not norms.size:
        return None
    steps = np.concatenate([np.linalg.norm(np.diff(rotation, axis=0), axis=1) for rotation in rotations])
    return {
        "norm_min": float(norms.min()),
        "norm_max": float(norms.max()),
        "share_above_pi": float(np.mean(norms > np.pi)),
        "largest_step": float(np.max(steps[np.isfinite(steps)], initial=0.0)),
        "quaternion": _is_quaternion(states),
    }


def _is_quaternion(states: list[np.ndarray]) -> bool:
    """Whether state 3:7 is a unit vector that is not always the same."""
    values = np.concatenate([state[:, 3:7] for state in states]).astype(np.float64)
    norms = np.linalg.norm(values, axis=1)
    return bool(np.all(np.abs(norms - 1) < 1e-3) and np.ptp(values, axis=0).max(initial=0) > 1e-3)


def find_duplicates(actions: list[np.ndarray], states: list[np.ndarray]) -> list[list[int]]:
    """Groups of episodes with equal actions and states."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for number, parts in enumerate(zip(actions, states, strict=True)):
        content = b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
        groups[hashlib.sha256(content).digest()].append(number)
    return [members for members in groups.values() if len(members) > 1]


def measure_camera(source: EpisodeSource, camera: str, max_images: int) -> dict:
    """Sizes of the decoded images of a camera, and which are undecodable, constant or the same all episode long."""
    sizes: Counter[str] = Counter()
    broken: list[list] = []
    constant: list[list[int]] = []
    grey = 0
    seen: dict[int, set[bytes]] = defaultdict(set)
    counts: Counter[int] = Counter()
    total = int(source.lengths.sum())
    chosen = chosen_frames(source.lengths, max_images)
    for episode, step in over(chosen, "decoding", "images", min(max_images or total, total), leave=False):
        try:
            pixels = read_pixels(source, camera, episode, step)
        except ValueError as error:
            broken.append([episode, step, str(error)])
            continue
        sizes[f"{pixels.shape[1]}x{pixels.shape[0]}"] += 1
        if pixels.min() == pixels.max():
            constant.append([episode, step])
        grey += bool((pixels[..., :2] == pixels[..., 1:]).all())
        seen[episode].add(hashlib.sha256(pixels.tobytes()).digest())
        counts[episode] += 1
    return {
        "decoded": sum(sizes.values()),
        "sizes": dict(sizes.most_common()),
        "undecodable": len(broken),
        "undecodable_at": broken[:_MAX_LISTED],
        "constant": len(constant),
        "constant_at": constant[:_MAX_LISTED],
        "grey": grey,
        "frozen_episodes": [episode for episode, hashes in seen.items() if counts[episode] > 1 and len(hashes) == 1],
    }


def chosen_frames(lengths: np.ndarray, limit: int) -> Iterator[tuple[int, int]]:
    """(episode, step) of at most `limit` frames, evenly spread over all; all of them for 0."""
    total = int(lengths.sum())
    ends = np.cumsum(lengths)
    count = total if limit == 0 else min(limit, total)
    for frame in np.linspace(0, max(0, total - 1), count).round().astype(np.int64):
        episode = int(np.searchsorted(ends, frame, side="right"))
        yield episode, int(frame - (ends[episode] - lengths[episode]))


def read_pixels(source: EpisodeSource, camera: str, episode: int, step: int) -> np.ndarray:
    """One frame, uint8 (H, W, 3); ValueError (DataSetError) when it cannot be read or decoded."""
    frame = source.frame(camera, episode, step)
    return decode_image(frame) if isinstance(frame, bytes) else frame
