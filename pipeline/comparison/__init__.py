"""Students side by side: configurations trained on equal terms, or folders of predictions."""
