"""A name, file or folder -> columns -> labels and splits -> tokens on disk."""
