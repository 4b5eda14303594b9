"""A fair bench of the student stage's supervisions, from the same caches, on the phantom.

    python -m benchmarks.accuracy FOLDER --regimes a,b,c,d,e --seeds 5 --jobs 2

A job is one regime with one seed: phantoms, teachers, cache and students are all drawn anew for it.
What is there is kept: the same command goes on wherever it was stopped.
"""
