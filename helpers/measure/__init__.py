"""Speed, memory and answers of an engine."""
