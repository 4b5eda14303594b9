"""`pipeline check`: what can be known of files, labels, HU and teachers before a GPU is used."""
