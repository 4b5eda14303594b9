"""The resumable units of work, one module per stage, each beside its annotated YAML."""
