"""The small module that the scripts share. Importing it costs nothing: torch comes only with what needs it."""
