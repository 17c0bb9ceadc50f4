"""The programs of this repository as processes: here or on a Ray cluster, what a run leaves, what is timed."""
