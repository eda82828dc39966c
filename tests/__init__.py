"""Everything that shows that the project works."""
