"""Where else than in metrics.jsonl the numbers of a training go, by name."""
