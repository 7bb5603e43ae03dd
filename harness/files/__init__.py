"""Files as people have them: whatever they are called, told by their content."""
