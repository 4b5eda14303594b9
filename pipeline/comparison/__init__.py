"""`pipeline compare`: student configurations from one cache, on equal terms, in one table."""
