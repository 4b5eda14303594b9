"""`pipeline init`: folders of other tools, in the words of a registry."""
