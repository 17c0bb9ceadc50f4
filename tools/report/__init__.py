"""What a sweep leaves, told: the assignment's questions, claims and verdicts, pages and pictures."""
