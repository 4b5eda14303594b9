"""Teachers: pre-trained networks, each expert in one or several organs."""
