"""The cache: the only door between stage one and stage two."""
