"""An OpenAI-compatible server: its settings, its life, its load, its doors."""
