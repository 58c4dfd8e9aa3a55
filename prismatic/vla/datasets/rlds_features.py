"""`features.json` of a tensorflow_datasets folder: reading any tree, writing the LIBERO one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prismatic.evidence.checks import FOREIGN, read_object
from prismatic.vla.datasets.source import DataSetError, MissingFeatureError

__all__ = ["FeatureSpec", "MissingFeatureError", "libero_features", "read_features"]

_PREFIX = "tensorflow_datasets.core.features"
_NUMBERS = {"bool", "float16", "float32", "float64"} | {
    f"{kind}{n}" for kind in ("int", "uint") for n in (8, 16, 32, 64)
}


@dataclass(frozen=True)
class FeatureSpec:
    """One leaf of the feature tree.

    name: flat key in the Example, e.g. `steps/observation/image`. kind: `image`, `tensor`, `text`, or `other` for what
    this reader does not know, with its description as dtype. dtype: declared tfds dtype (`string` for text). shape:
    without the step axis; -1 = unknown. per_step: below a sequence, i.e. one value per time step.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    per_step: bool

    @property
    def number_type(self) -> np.dtype | None:
        """The numpy type of a declared number or bool; None for text, images and types that numpy does not have."""
        return np.dtype(self.dtype) if self.kind == "tensor" and self.dtype in _NUMBERS else None


def read_features(path: Path) -> dict[str, FeatureSpec]:
    """Leaves of a `features.json`, by flat name; of types that this reader does not know the kind is `other`.

    Raises FileNotFoundError for a missing file and DataSetError (with the file) for what is no description of features.
    """
    try:
        tree = read_object(path, finite=False, limits=FOREIGN)
    except ValueError as error:
        raise DataSetError(str(error)) from None
    leaves: dict[str, FeatureSpec] = {}
    try:
        _collect(tree, "", None, leaves)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RecursionError) as error:
        raise DataSetError(f"{path}: unsupported feature description: {error}") from error
    return leaves


def _collect(node: dict, name: str, outer: tuple[int, ...] | None, leaves: dict[str, FeatureSpec]) -> None:
    """Add the leaves below a node. outer: sizes of the sequences between the steps and here, None outside the steps."""
    if "featuresDict" in node:
        for key, child in node["featuresDict"]["features"].items():
            _collect(child, f"{name}/{key}" if name else key, outer, leaves)
    elif "sequence" in node:
        # The steps themselves are a sequence; one inside them is a further axis, of its own size in every step if -1.
        size = () if outer is None else (*outer, int(node["sequence"].get("length", -1)))
        _collect(node["sequence"]["feature"], name, size, leaves)
    else:
        try:
            leaves[name] = _leaf(node, name, outer)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            # Only who reads it has to understand it.
            leaves[name] = FeatureSpec(name, "other", f"no description of a feature: {error!r}", (), outer is not None)


def _leaf(node: dict, name: str, outer: tuple[int, ...] | None) -> FeatureSpec:
    per_step, outer = outer is not None, outer or ()
    shape: tuple[int, ...]
    if "text" in node:
        kind, dtype, shape = "text", "string", ()
    elif "image" in node:
        kind, dtype, shape = "image", node["image"].get("dtype", "uint8"), _shape(node["image"])
    elif "classLabel" in node:
        kind, dtype, shape = "tensor", "int64", ()
    elif "boundingBox" in node:
        kind, dtype, shape = "tensor", node["boundingBox"].get("dtype", "float32"), (4,)
    elif "tensor" in node:
        kind, dtype, shape = "tensor", node["tensor"]["dtype"], _shape(node["tensor"])
        if node["tensor"].get("encoding", "none") not in ("none", ""):
            kind, dtype = "other", f"{dtype} with encoding {node['tensor']['encoding']!r}"
    else:
        kind, dtype, shape = "other", node.get("pythonClassName", sorted(node)), ()
    if kind != "tensor" and outer:
        kind, dtype = "other", f"a sequence of {dtype} in every step"
    return FeatureSpec(name, kind, str(dtype), (*outer, *shape), per_step)


def _shape(spec: dict) -> tuple[int, ...]:
    return tuple(int(size) for size in spec.get("shape", {}).get("dimensions", ()))


def libero_features(image_shape: tuple[int, int, int]) -> dict:
    """`features.json` content of the LIBERO RLDS layout for images of `image_shape` (H, W, 3)."""
    observation = {
        "image": _image(image_shape, "Main camera RGB observation."),
        "wrist_image": _image(image_shape, "Wrist camera RGB observation."),
        "state": _tensor((8,), "Robot EEF state (6D pose, 2D gripper)."),
        "joint_state": _tensor((7,), "Robot joint angles."),
    }
    step = {
        "observation": _features_dict(observation),
        "action": _tensor((7,), "Robot EEF action."),
        "discount": _scalar("float32", "Discount if provided, default to 1."),
        "reward": _scalar("float32", "Reward if provided, 1 on final step for demos."),
        "is_first": _scalar("bool", "True on first step of the episode."),
        "is_last": _scalar("bool", "True on last step of the episode."),
        "is_terminal": _scalar("bool", "True on last step of the episode if it is a terminal step, True for demos."),
        "language_instruction": _text("Language Instruction."),
    }
    steps = {
        "pythonClassName": f"{_PREFIX}.dataset_feature.Dataset",
        "sequence": {"feature": _features_dict(step), "length": "-1"},
    }
    metadata = _features_dict({"file_path": _text("Path to the original data file.")})
    return _features_dict({"steps": steps, "episode_metadata": metadata})


def _features_dict(features: dict) -> dict:
    return {"pythonClassName": f"{_PREFIX}.features_dict.FeaturesDict", "featuresDict": {"features": features}}


def _image(shape: tuple[int, int, int], description: str) -> dict:
    image = {"shape": {"dimensions": [str(size) for size in shape]}, "dtype": "uint8", "encodingFormat": "jpeg"}
    return {"pythonClassName": f"{_PREFIX}.image_feature.Image", "image": image, "description": description}


def _tensor(shape: tuple[int, ...], description: str) -> dict:
    tensor = {"shape": {"dimensions": [str(size) for size in shape]}, "dtype": "float32", "encoding": "none"}
    return {"pythonClassName": f"{_PREFIX}.tensor_feature.Tensor", "tensor": tensor, "description": description}


def _scalar(dtype: str, description: str) -> dict:
    tensor = {"shape": {}, "dtype": dtype, "encoding": "none"}
    return {"pythonClassName": f"{_PREFIX}.scalar.Scalar", "tensor": tensor, "description": description}


def _text(description: str) -> dict:
    return {"pythonClassName": f"{_PREFIX}.text_feature.Text", "text": {}, "description": description}
