"""nnU-Net beside our student: the same words of the same teachers, the same seconds of one core."""
