"""Programs on top of the chapters: `python -m tools.sweep`, from the root of the repository."""
