"""Before a run: a registry from folders, checks, a plan, jobs for a cluster."""
