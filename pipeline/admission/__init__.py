"""The admission gate: which teachers stage one goes on with, and what it measured of them."""
