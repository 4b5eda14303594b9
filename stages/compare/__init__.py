"""`pipeline compare`: configurations trained on equal terms, scored and set side by side."""
