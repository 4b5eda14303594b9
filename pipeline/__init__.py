"""organ-distill: one multi-organ CT network from single-organ datasets and networks."""
