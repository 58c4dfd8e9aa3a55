"""Write the policy between a trained checkpoint and the model it started from: theta_0 + scale (theta - theta_0).

python vla-scripts/interpolate_weights.py --help

The program is prismatic/programs/interpolate_weights.py, installed as `craft-interpolate`.
"""

from prismatic.programs.interpolate_weights import InterpolateConfig, interpolate, main  # noqa: F401

if __name__ == "__main__":
    main()
