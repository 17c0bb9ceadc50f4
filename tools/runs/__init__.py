"""Runs of the programs: made here or on a Ray cluster, kept in folders, measured."""
