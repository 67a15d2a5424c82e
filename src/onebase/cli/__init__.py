"""The command line: a thin layer over the library. Importing it imports neither torch nor transformers."""
