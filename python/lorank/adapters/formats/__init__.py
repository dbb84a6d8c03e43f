"""The formats that adapters are stored in, and the layouts of their keys."""
