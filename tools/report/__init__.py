"""Reports: the assignment's questions, the papers' claims, what an adapter learned; their pages and pictures."""
