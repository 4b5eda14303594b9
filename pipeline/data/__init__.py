"""From files on disk to volumes: registry, NIfTI, resampling, the phantom."""
