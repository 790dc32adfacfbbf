"""Export: a finished folder as other tools want it, with a model card and a measure of what the export cost.

A format is a module with PRECISIONS (the default first), check, save, read (as another tool would load it) and commands.
"""

from utils.model.export import adapter, folder, gguf_file

FORMAT_MODULES = {"folder": folder, "gguf": gguf_file, "adapter": adapter}
