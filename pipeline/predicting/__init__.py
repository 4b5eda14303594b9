"""Label maps and probabilities of CT files: what goes in, and what is written of each."""
