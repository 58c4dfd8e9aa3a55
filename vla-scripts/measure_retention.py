"""Measure what training did to the representation: drift, CKA, linear probes and action errors, as one JSON file.

python vla-scripts/measure_retention.py --help

The program is prismatic/programs/measure_retention.py, installed as `craft-measure`.
"""

from prismatic.programs.measure_retention import MeasureConfig, main, measure  # noqa: F401

if __name__ == "__main__":
    main()
