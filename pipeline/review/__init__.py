"""After a run: what there is, whether it can be trusted, what it is worth, and what can go."""
