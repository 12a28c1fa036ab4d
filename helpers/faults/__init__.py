"""What a failure was and what to do: logs, the catalogue, the report."""
