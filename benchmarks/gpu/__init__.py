"""What a machine with one GPU and no network is to be asked, in one run of a few minutes."""
