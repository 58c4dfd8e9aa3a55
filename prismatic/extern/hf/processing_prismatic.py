"""Image processor and processor with the published configuration files. Independent of torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from prismatic.evidence.files import write_json
from prismatic.extern.hf.tokenizer_files import load_tokenizer, save_tokenizer
from prismatic.model_files import read_json

PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
# ImageNet statistics rounded to bfloat16, as stored with published checkpoints; SigLIP uses 0.5.
DINO_MEAN, DINO_STD = (0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375)
_LARGEST_IMAGE = 4096  # pixels of a side
_LARGEST_LEVEL = 1e3  # of a mean, and of 1 / deviation; images are in [0, 1] there
SIGLIP_MEAN, SIGLIP_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


class PrismaticImageProcessor(BaseImageProcessor):
    """uint8 images -> normalised floats, one set of three channels per vision tower.

    A BaseImageProcessor because transformers 5 registers nothing else; its `__call__` hands over to `preprocess`.
    """

    model_input_names = ["pixel_values"]

    def __init__(  # noqa: PLR0913 -- fields of the published file
        self,
        use_fused_vision_backbone: bool = True,
        image_resize_strategy: str = "resize-naive",
        input_sizes: list[list[int]] | None = None,
        interpolations: list[str] | None = None,
        means: list[list[float]] | None = None,
        stds: list[list[float]] | None = None,
        **published: Any,
    ) -> None:
        """Fields of preprocessor_config.json; stored `tvf_normalize_params` override `means` and `stds`.

        Raises ValueError when the lists do not have one entry per tower.
        """
        super().__init__()
        towers = 2 if use_fused_vision_backbone else 1
        self.use_fused_vision_backbone = use_fused_vision_backbone
        self.image_resize_strategy = image_resize_strategy
        self.input_sizes = [list(size) for size in (input_sizes or [[3, 224, 224]] * towers)]
        self.interpolations = list(interpolations or ["bicubic"] * towers)
        self.means = [list(m) for m in (means or [DINO_MEAN, SIGLIP_MEAN][-towers:])]
        self.stds = [list(s) for s in (stds or [DINO_STD, SIGLIP_STD][-towers:])]
        self._use_stored_normalisation(published.get("tvf_normalize_params"))
        for name in ("input_sizes", "interpolations", "means", "stds"):
            if len(getattr(self, name)) != towers:
                raise ValueError(
                    f"{PREPROCESSOR_FILE} field `{name}`: expected {towers} entries, got {getattr(self, name)}"
                )
        self._check_numbers()
        mean, std = (torch.tensor(values).reshape(towers, 3, 1, 1) for values in (self.means, self.stds))
        # (v/255 - mean) / std as one multiply-add per channel.
        self._scale, self._offset = 1.0 / (255.0 * std), -mean / std

    def _check_numbers(self) -> None:
        numbers = [(name, value) for name in ("means", "stds") for entry in getattr(self, name) for value in entry]
        shapes = {len(entry) for name in ("means", "stds", "input_sizes") for entry in getattr(self, name)}
        wrong = [f"{name} {value}" for name, value in numbers if not abs(value) <= _LARGEST_LEVEL]
        wrong += [f"stds {value}" for name, value in numbers if name == "stds" and not value > 1 / _LARGEST_LEVEL]
        wrong += [f"input_sizes {s}" for s in self.input_sizes if not all(1 <= n <= _LARGEST_IMAGE for n in s[-2:])]
        if wrong or shapes != {3}:
            raise ValueError(
                f"{PREPROCESSOR_FILE}: expected three means, three positive deviations and images of at most "
                f"{_LARGEST_IMAGE} pixels per tower, found {', '.join(wrong[:3]) or f'lists of {sorted(shapes)}'}"
            )

    def _use_stored_normalisation(self, stored: list[dict[str, Any]] | None) -> None:
        if stored:
            self.means = [list(entry["mean"]) for entry in stored]
            self.stds = [list(entry["std"]) for entry in stored]

    @property
    def image_size(self) -> int:
        """Side length in pixels (all towers share it)."""
        return self.input_sizes[0][-1]

    def preprocess_batch(self, images: torch.Tensor | np.ndarray) -> torch.Tensor:
        """uint8 (B, n, H, W, 3) at the input size -> float32 (B, 3*towers*n, H, W).

        Channel order: image 0 [tower 0 RGB | tower 1 RGB], image 1 [...], ...
        Raises ValueError on another dtype or shape (resizing belongs to the image pipeline).
        """
        images = torch.as_tensor(np.asarray(images)) if isinstance(images, np.ndarray) else images
        size = self.image_size
        if images.dtype != torch.uint8 or images.ndim != 5 or tuple(images.shape[2:]) != (size, size, 3):
            raise ValueError(
                f"images: expected uint8 of shape (B, n, {size}, {size}, 3), got {images.dtype} {tuple(images.shape)}"
            )
        batch, count = images.shape[:2]
        pixels = images.permute(0, 1, 4, 2, 3).unsqueeze(2).to(torch.float32).contiguous()
        scale, offset = self._scale.to(pixels.device), self._offset.to(pixels.device)
        return torch.addcmul(offset, pixels, scale).reshape(batch, count * scale.shape[0] * 3, size, size)

    # It gives the general BatchFeature, as published; the base class names a subclass.
    def preprocess(self, images: Image.Image | list[Image.Image], **_: Any) -> BatchFeature:  # type: ignore[override]
        """PIL images, one per sample -> {"pixel_values": (B, 3*towers, H, W)}; resized (bicubic) when needed."""
        images = images if isinstance(images, (list, tuple)) else [images]
        pixels = self.preprocess_batch(np.stack([self._resize(image)[None] for image in images]))
        return BatchFeature({"pixel_values": pixels})

    def _resize(self, image: Image.Image) -> np.ndarray:
        size = self.image_size
        image = image.convert("RGB")
        if image.size != (size, size):
            if self.image_resize_strategy != "resize-naive":
                raise NotImplementedError(f"image_resize_strategy {self.image_resize_strategy!r} is not supported")
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(image)

    def to_dict(self) -> dict[str, Any]:
        """The published fields; readable by `from_dict`."""
        sizes = [size[-2:] for size in self.input_sizes]
        stats = zip(self.means, self.stds, strict=True)
        return {
            "image_processor_type": "PrismaticImageProcessor",
            "processor_class": "PrismaticProcessor",
            "use_fused_vision_backbone": self.use_fused_vision_backbone,
            "image_resize_strategy": self.image_resize_strategy,
            "input_sizes": self.input_sizes,
            "interpolations": self.interpolations,
            "means": self.means,
            "stds": self.stds,
            "tvf_crop_params": [{"output_size": size} for size in sizes],
            "tvf_do_letterbox": False,
            "tvf_letterbox_fill": None,
            "tvf_normalize_params": [{"inplace": False, "mean": mean, "std": std} for mean, std in stats],
            "tvf_resize_params": [
                {"antialias": True, "interpolation": 3, "max_size": None, "size": size} for size in sizes
            ],
        }

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **options: Any) -> PrismaticImageProcessor:
        """Inverse of `to_dict`; accepts the published file content.

        `options`: loading options of the Auto classes, without effect. TypeError when one names a stored field.
        """
        overridden = sorted(options.keys() & image_processor_dict.keys())
        if overridden:
            raise TypeError(f"{PREPROCESSOR_FILE}: fields {overridden} cannot be replaced while loading")
        return cls(**image_processor_dict)

    def save_pretrained(self, directory: str | Path) -> None:  # type: ignore[override]  # nothing goes to the Hub
        """Write preprocessor_config.json."""
        write_json(Path(directory) / PREPROCESSOR_FILE, self.to_dict())

    @classmethod
    def from_pretrained(  # type: ignore[override]  # no download: a local folder is all it takes
        cls, directory: str | Path, **options: Any
    ) -> PrismaticImageProcessor:
        """Read preprocessor_config.json of a local folder; FileNotFoundError when absent. `options`: `from_dict`."""
        return cls.from_dict(read_json(Path(directory) / PREPROCESSOR_FILE), **options)


class PrismaticProcessor:
    """Tokenizer and image processor that travel together."""

    def __init__(self, image_processor: PrismaticImageProcessor, tokenizer: Any) -> None:
        """`tokenizer` is any Hugging Face tokenizer."""
        self.image_processor = image_processor
        self.tokenizer = tokenizer

    def __call__(self, text: str | list[str], images: Any, padding: bool | str = False) -> BatchFeature:
        """input_ids, attention_mask (B, L) and pixel_values (B, 3*towers, H, W); ValueError on unequal counts.

        The result is a mapping whose `to(device, dtype=...)` casts the pixels and leaves the ids integer.
        """
        tokens = self.tokenizer([text] if isinstance(text, str) else text, return_tensors="pt", padding=padding)
        pixel_values = self.image_processor(images)["pixel_values"]
        if len(pixel_values) != len(tokens["input_ids"]):
            raise ValueError(f"processor: {len(tokens['input_ids'])} texts but {len(pixel_values)} images")
        return BatchFeature(
            {
                "input_ids": tokens["input_ids"],
                "attention_mask": tokens["attention_mask"],
                "pixel_values": pixel_values,
            }
        )

    def save_pretrained(self, directory: str | Path) -> None:
        """Write tokenizer files, preprocessor_config.json and processor_config.json."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        save_tokenizer(self.tokenizer, Path(directory))
        self.image_processor.save_pretrained(directory)
        write_json(Path(directory) / PROCESSOR_FILE, {"processor_class": "PrismaticProcessor"})

    @classmethod
    def from_pretrained(cls, directory: str | Path, **options: Any) -> PrismaticProcessor:
        """Read from a local folder, offline; FileNotFoundError when it or its files are missing.

        `options`: loading options of AutoProcessor, without effect.
        """
        image_processor = PrismaticImageProcessor.from_pretrained(directory, **options)
        return cls(image_processor, load_tokenizer(directory))
