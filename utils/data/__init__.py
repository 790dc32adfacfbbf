"""Data: from any file to chat rows."""
