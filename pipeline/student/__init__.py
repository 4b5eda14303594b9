"""The student: everything of stage two; it never sees a teacher, only the cache."""
