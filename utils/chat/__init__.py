"""Chat: the session and the terminal."""
