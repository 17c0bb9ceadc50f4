"""The report: runs side by side, claims and verdicts, pages and pictures."""
