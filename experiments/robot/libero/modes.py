"""How images are made and how episodes start."""

from __future__ import annotations

from enum import Enum


class RenderMode(str, Enum):
    """How camera images are produced.  Recorded with every data set and every evaluation.

    PUBLISHED: the images of robosuite's own camera observables, multisampling and reflections on. The published LIBERO
    numbers were produced with them. They are rendered only when `LiberoEnv.observe` is called (`scene_sampling.py`).
    EVERY_STEP: the same images, bit for bit, rendered in every control step as robosuite does it: the reference for
    tests and benchmarks, up to ten times slower.
    LAZY: the cameras are rendered when `LiberoEnv.observe` is called, without multisampling and without reflections;
    2.5 times faster per image, and images nobody looks at cost nothing.

    The images are not equal.  Both show the same moment: robosuite samples its observables one or two physics
    sub-steps (2-4 ms, 0.4 mm at full speed) before the end of the control step.  But smoothed edges and reflections
    are missing in LAZY: over libero_spatial at 256 pixels the images differ by 2.4 (agentview) and 1.3 (wrist) grey
    levels on average, and 5.5 % and 3.7 % of the pixels differ by more than 8.  Use one mode for demonstrations and
    evaluation, and PUBLISHED for checkpoints trained on the published data.
    """

    PUBLISHED = "published"
    EVERY_STEP = "every_step"
    LAZY = "lazy"


class ResetMode(str, Enum):
    """How an episode starts.

    HARD rebuilds the simulation model on every reset, as published. SOFT reuses it. With an initial state and a seed
    SOFT builds the model once, as HARD would, keeps what the reset left in the simulation, and returns to that: the
    episode is the same, bit for bit. Sampled starts differ (a soft reset leaves fixtures where they were built).
    """

    HARD = "hard"
    SOFT = "soft"
