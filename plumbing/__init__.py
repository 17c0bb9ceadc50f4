"""What a first reading can skip: each file has one job, which its name says."""
