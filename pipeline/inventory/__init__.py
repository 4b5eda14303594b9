"""What the cache holds, why it is there, whether it can be trusted, and what can go."""
