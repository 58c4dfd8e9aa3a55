"""Looks at a data set before it is trained on: report, frame strips, warnings.

python -m prismatic.vla.datasets.inspect datasets/rlds/libero_spatial_scripted_no_noops

Writes `report.json` and one `frames_<camera>.png` per camera. `--backend tfds` also reads an RLDS data set with
tensorflow-datasets (extra `tfds`) and lists every difference.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from prismatic.command_line import OneLineParser, bad_input_in_one_line, in_range
from prismatic.evidence.files import write_json
from prismatic.output_folder import check_folder, held
from prismatic.vla.action_spec import ActionSpec
from prismatic.vla.datasets.format_table import find_format, folder_and_split
from prismatic.vla.datasets.formats import open_data_set
from prismatic.vla.datasets.inspect_checks import find_problems
from prismatic.vla.datasets.inspect_measures import QUANTILES, measure
from prismatic.vla.datasets.inspect_strip import draw_strip
from prismatic.vla.datasets.registry import DataSetConfig, get_data_set_config, load_data_set_file
from prismatic.vla.datasets.rlds import RLDSReader
from prismatic.vla.datasets.rlds_source import RLDSSource
from prismatic.vla.datasets.rlds_versions import version_directories
from prismatic.vla.datasets.source import EpisodeSource, MissingFeatureError, SourceKeys

_MAX_INSTRUCTIONS = 20


def open_folder(
    directory: str | os.PathLike, split: str | None = None, skip_bad: bool = False, num_images: int | None = None
) -> tuple[str, EpisodeSource, DataSetConfig]:
    """Open a data-set folder `<root>/<name>` or an RLDS version directory `<root>/<name>/<x.y.z>`.

    The configuration is that of the folder's name. An RLDS folder without one is opened with all its cameras and the
    features `state` and `action`; other formats need a registered configuration (KeyError). num_images: only this many
    cameras have to be there.

    Returns:
        (name, source, configuration). Raises what `open_data_set` raises.
    """
    directory = Path(os.path.abspath(directory))  # `.` has no name
    folder = directory.parent if _is_version(directory) else directory
    # Of `<root>/<name>/<configuration>` the configuration may be that of `<name>`.
    name = folder.name if _is_registered(folder.name) else f"{folder.parent.name}/{folder.name}"
    if _is_registered(name):
        config = get_data_set_config(name)
    elif find_format(folder) == "rlds":
        name, config = (
            folder.name,
            _guess_config(directory if folder != directory else version_directories(folder)[-1], split),
        )
    else:
        config = get_data_set_config(folder.name)  # raises
    if folder == directory:
        return name, open_data_set(_root_of(folder, name), name, config, split, num_images, skip_bad), config
    keys = tuple(keys.with_cameras(num_images, name) for keys in config.keys)
    return name, _open_version(directory, keys, split, skip_bad), config


def _is_registered(name: str) -> bool:
    try:
        get_data_set_config(name)
    except KeyError:
        return False
    return True


def _root_of(folder: Path, name: str) -> Path:
    return folder.parents[name.count("/")]


def _is_version(directory: Path) -> bool:
    return directory in version_directories(directory.parent)


def _open_version(directory: Path, candidates: tuple[SourceKeys, ...], split: str | None, skip_bad: bool) -> RLDSSource:
    problems = []
    for keys in candidates:
        if keys.format == "rlds":
            try:
                return RLDSSource(directory, keys, split, skip_bad)
            except MissingFeatureError as error:
                problems.append(str(error))
    raise MissingFeatureError("; ".join(problems) or f"{directory}: its configuration has no keys for rlds")


def _guess_config(directory: Path, split: str | None) -> DataSetConfig:
    reader = RLDSReader(directory, split)
    sizes = {}
    for name in ("steps/action", "steps/observation/state"):
        shape = reader.require(name).shape
        sizes[name] = shape[0] if len(shape) == 1 and shape[0] > 0 else 1
    action_dim, proprio_dim = sizes.values()
    return DataSetConfig(
        standardize=lambda actions, state: (actions, state),
        keys=(SourceKeys("rlds", reader.camera_keys, ("state",), "action"),),
        action_mask=(True,) * action_dim,
        action_spec=ActionSpec(action_dim=action_dim, proprio_dim=proprio_dim),
    )


def inspect(
    directory: str | os.PathLike,
    output: str | os.PathLike | None = None,
    split: str | None = None,
    max_images: int = 2000,
) -> tuple[dict, Path]:
    """Measure a data set and write `report.json` and `frames_<camera>.png`.

    Args:
        directory: see `open_folder`; `FOLDER:SPLIT` is another split.
        output: folder to write to, default `runs/inspect/<name>`.
        split: split of the data set, None is `train` or the only one.
        max_images: decoded per camera, 0 = all.

    Returns:
        (report, output folder). Raises what `open_folder` raises, and UsageError for an output that cannot be written.
    """
    place, named = folder_and_split(os.fspath(directory))
    name, source, config = open_folder(place, split or named, True)
    output = Path(output or Path("runs") / "inspect" / name)
    check_folder(output, "--output")
    with held(output, "--output"):
        return _inspect(source, config, name, output, max_images), output


def _inspect(source: EpisodeSource, config: DataSetConfig, name: str, output: Path, max_images: int) -> dict:
    report: dict[str, Any] = {
        "data_set": name,
        "directory": str(source.directory),
        "format": source.keys.format,
        "split": source.split,
        "keys": {"cameras": source.keys.cameras, "state": source.keys.state, "action": source.keys.action},
    }
    report |= measure(source, config, max_images) | {"unreadable": source.problems, "notes": source.warnings}
    report["warnings"] = find_problems(report)
    report["strips"] = [
        draw_strip(source, camera, output / f"frames_{camera.replace('/', '.')}.png").name
        for camera in source.keys.cameras
    ]
    write_report(report, output)
    return report


def write_report(report: dict, output: Path) -> None:
    """Write `report.json` to a folder in one go."""
    write_json(output / "report.json", report, indent=1, allow_nan=False)


def format_report(report: dict) -> str:
    """The report as text for a terminal, ending in a newline."""
    length = report["episode_length"]
    rate = "not declared" if report["control_hz"] is None else f"{report['control_hz']:g} Hz"
    lines = [
        f"data set       {report['data_set']} ({report['format']}, split {report['split']})",
        f"fingerprint    {report['fingerprint'][:16]}",
        f"episodes       {report['episodes']}, {report['frames']} frames",
        f"length         min {length['min']}, median {length['median']:g}, max {length['max']} steps",
        f"control rate   {rate}",
        f"conventions    {report['conventions']}",
    ]
    lines += _instruction_lines(report["instructions"])
    for camera, content in report["cameras"].items():
        sizes = ", ".join(f"{size} px ({count})" for size, count in content["sizes"].items()) or "none"
        lines.append(f"camera         {camera}: {sizes}, {content['decoded']} images decoded")
    for group in ("action", "state"):
        lines += _quantity_lines(group, report[group])
    counts = ", ".join(f"{value}: {count}" for value, count in report["gripper"].items())
    lines.append(f"gripper        {counts} (last action dimension: frames)")
    if report["noops"] is not None:
        lines.append(f"no-ops         {report['noops']['count']} ({report['noops']['share']:.2%})")
    if report["rotation"] is not None:
        rotation = report["rotation"]
        lines.append(
            f"rotation       norm {rotation['norm_min']:.3f} .. {rotation['norm_max']:.3f}, "
            f"{rotation['share_above_pi']:.0%} above pi, at most {rotation['largest_step']:.3f} rad per step"
        )
    lines += [
        f"WARNING        {entry['check']}: found {entry['found']}; expected {entry['expected']}"
        for entry in report["warnings"]
    ]
    lines.append(f"warnings       {len(report['warnings'])}")
    return "\n".join(lines) + "\n"


def _instruction_lines(instructions: dict[str, int]) -> list[str]:
    shown = list(instructions.items())[:_MAX_INSTRUCTIONS]
    lines = [f"instruction    {count:4d} x {text!r}" for text, count in shown]
    if len(instructions) > len(shown):
        lines.append(f"               and {len(instructions) - len(shown)} more, see report.json")
    return lines


def _quantity_lines(group: str, content: dict) -> list[str]:
    lines = [f"{group:<14} dim " + "".join(f"{name:>10}" for name in QUANTILES)]
    for dim in range(content["dimensions"]):
        values = (content[name][dim] for name in QUANTILES)
        cells = "".join(f"{'-':>10}" if value is None else f"{value:>10.4f}" for value in values)
        lines.append(f"{'':14} {dim:3d} {cells}{'  constant' if str(dim) in content['constant'] else ''}")
    return lines


def _compare(directory: str, report: dict) -> int:
    from prismatic.vla.datasets.inspect_tfds import compare_with_tfds

    if report["format"] != "rlds":
        raise ValueError(f"--backend tfds reads RLDS data sets, {directory} is in {report['format']} format")
    report["tfds"] = result = compare_with_tfds(report["directory"], report["split"])
    for entry in result["differences"]:
        place = f"episode {entry['episode']}, {entry['feature']}"
        print(f"DIFFERENCE     {place}: tfds has {entry['tfds']}, this reader {entry['ours']}")
    print(
        f"tfds           {result['episodes']} episodes, {result['values']} values and {result['images']} images "
        f"compared: {result['count']} differences; pixels differ by at most {result['largest_pixel_difference']}"
    )
    return 1 if result["count"] else 0


def _argument_parser() -> argparse.ArgumentParser:
    first_line = (__doc__ or "").partition("\n")[0]
    parser = OneLineParser(prog="python -m prismatic.vla.datasets.inspect", description=first_line)
    parser.add_argument("directory", help="<root>/<name>, or an RLDS version directory")
    parser.add_argument("--output", help="folder for report.json and PNG files (default runs/inspect/<name>)")
    parser.add_argument("--backend", choices=("native", "tfds"), default="native")
    parser.add_argument("--split", help="split of the data set (default train, or the only one)")
    parser.add_argument("--data_set_file", help="Python file that registers the data set (docs/datasets.md)")
    parser.add_argument(
        "--max_images", type=in_range(int, at_least=0), default=2000, help="images decoded per camera, 0 = all"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command line entry. Returns 0 (also with warnings), 1 when tfds reads something else, 2 for unreadable input."""
    args = _argument_parser().parse_args(argv)
    try:
        if args.data_set_file is not None:
            load_data_set_file(args.data_set_file)
        report, output = inspect(args.directory, args.output, args.split, args.max_images)
        print(format_report(report), end="")
        code = 0
        if args.backend == "tfds":
            code = _compare(args.directory, report)
            write_report(report, output)
        print(f"written        {output}{os.sep}")
        return code
    except (OSError, ValueError, KeyError, ImportError) as error:
        print(f"error: {error.args[0] if isinstance(error, KeyError) and error.args else error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    with bad_input_in_one_line("inspect"):
        sys.exit(main())
