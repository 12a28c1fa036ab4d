"""One vLLM engine, opened, used and closed; its memory comes back."""
