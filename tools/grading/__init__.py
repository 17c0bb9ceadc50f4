"""Grades what students hand in: the teacher's tests on their files, in processes that are shut in."""
