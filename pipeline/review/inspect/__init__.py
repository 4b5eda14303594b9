"""`pipeline inspect`: what a student would be taught, and where teachers and labels disagree."""
