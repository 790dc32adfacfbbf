"""The model: folders, loading, prompts, forward passes, adapters, answers."""
