"""The groups of scripts/bench.py: what is timed, against whom, and how results are judged and kept."""
