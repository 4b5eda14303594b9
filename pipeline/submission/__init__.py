"""`pipeline submit`: batch scripts from templates, chained jobs, and what became of them."""
