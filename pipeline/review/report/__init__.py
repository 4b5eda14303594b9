"""`pipeline report`: one HTML page about a student's run, that asks no network for anything."""
