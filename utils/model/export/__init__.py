"""Export: a finished folder as other tools want it, with a model card and a measure of what the export cost."""

from utils.model.export.folders import AdapterExport, FolderExport
from utils.model.export.gguf_file import GgufExport

FORMATS = {"folder": FolderExport, "gguf": GgufExport, "adapter": AdapterExport}
